"""From outputs a token to answers: tags of words with their spans, and answers in a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from qlora_runtime.spans import choose_answer
from qlora_runtime.words import NO_TOKEN, bio_spans, unread_tag
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_examples import SplitText
from qlora_kit.errors import EvalError
from qlora_kit.eval.task_answers import AnswerReader, Piece, TaskAnswer, rounded
from qlora_kit.recipe import DataSection
from qlora_kit.tasks.question_answering import question_windows
from qlora_kit.tasks.tagging import word_encoder
from qlora_kit.tasks.task import Task


class TagReader(AnswerReader):
    """A tag a word, from its first token in the window that holds it; O (or the first label) for words without one."""

    def __init__(self, task: Task[Any], tokenizer: PreTrainedTokenizerBase, section: DataSection) -> None:
        super().__init__(task)
        self.words = word_encoder(tokenizer, section.max_seq_len)
        self.bio = task.settings.scheme == "bio"
        self.columns = ["predicted_words", "predicted_tags", *(["predicted_spans"] if self.bio else [])]

    def blank(self, example: Any) -> Any:
        return replace(example, tags=(self.labels[0],) * len(example.words))

    def expected(self, example: Any) -> list[str]:
        return list(example.tags)

    def piece(self, output: Any, at: int, row: Encoded) -> Piece:
        """float64 [tokens, labels]."""
        return super().piece(output, at, row)[: len(row.input_ids)]

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        tags = [unread_tag(self.labels)] * len(example.words)
        for encoded, logits in zip(self.words.encode(example.words), pieces, strict=True):
            best = logits.argmax(-1)  # [tokens]
            for word, place in enumerate(encoded.places, encoded.first_word):
                if place != NO_TOKEN and place < len(best):
                    tags[word] = self.labels[int(best[place])]
        columns: dict[str, Any] = {"predicted_words": list(example.words)} if isinstance(example, SplitText) else {}
        columns["predicted_tags"] = tags
        if self.bio:
            columns["predicted_spans"] = [
                {"type": span.type, "start": span.start, "end": span.end, "words": example.words[span.start : span.end]}
                for span in bio_spans(tags)
            ]
        return TaskAnswer(tags, columns)


class SpanReader(AnswerReader):
    """The best answer over the windows of a context; empty where there is none and the task allows that."""

    columns = ("predicted_answer", "answer_score", "answer_start")

    def __init__(self, task: Task[Any], tokenizer: PreTrainedTokenizerBase, section: DataSection) -> None:
        super().__init__(task)
        self.windows = question_windows(tokenizer, section.max_seq_len, task.settings.stride)

    def blank(self, example: Any) -> Any:
        return replace(example, answers=())

    def expected(self, example: Any) -> list[str]:
        return [answer.text for answer in example.answers]

    def piece(self, output: Any, at: int, row: Encoded) -> Piece:
        """float64 [2, tokens]: start and end logits."""
        sides = [
            side[at, : len(row.input_ids)].float().cpu().numpy() for side in (output.start_logits, output.end_logits)
        ]
        return np.asarray(sides, dtype=np.float64)

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        there = self.windows.encode(example.question, example.context)
        if [part.input_ids.tolist() for part in there] != [part.input_ids.tolist() for part in windows]:
            raise EvalError(
                f"question {example.question!r} was cut into other windows than these",
                got=len(windows),
                allowed=f"{len(there)} windows",
            )
        settings = self.task.settings
        found = choose_answer(
            example.context,
            there,
            [(piece[0], piece[1]) for piece in pieces],
            settings.max_answer_tokens,
            settings.unanswerable,
        )
        cells = [found.text, rounded([found.score])[0], found.start]
        return TaskAnswer(found.text, dict(zip(self.columns, cells)))
