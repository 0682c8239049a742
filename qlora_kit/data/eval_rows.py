"""Held-out rows as questions: the prompt to answer, and the answer that the data gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora_kit.data.chat_spans import find_spans
from qlora_kit.data.examples import Conversation, Example, PlainText, PromptCompletion, RowError, split_key
from qlora_kit.data.masking import Encoded, encode_whole, plain_special
from qlora_kit.data.reading import SourceEncoder, eval_source
from qlora_kit.data.report import DataReport
from qlora_kit.data.schemas import RowParser
from qlora_kit.data.sources import read_rows
from qlora_kit.data.template import end_of_turn, render_chat
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection


@dataclass(frozen=True)
class EvalRow:
    """One held-out row.

    Attributes:
        prompt_ids: int32 [tokens], all before the last assistant turn with the generation prompt: what a
            model is given to generate from.
        completion: the text that should follow, without the end of turn.
        example: the whole row.
        source: index into the report's sources.
        row: row number in that source.
        place: `FILE row N`.
        references: completions that the data accepts, the row's own first.
    """

    prompt_ids: np.ndarray
    completion: str
    example: PromptCompletion | Conversation
    source: int
    row: int
    place: str
    references: tuple[str, ...]

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The turns before the answer; a bare prompt is one user turn."""
        chat = self.example if isinstance(self.example, Conversation) else self.example.as_conversation()
        return list(chat.messages[: chat.last_assistant()])


def eval_rows(
    section: DataSection,
    tokenizer: Any,
    seed: int,
    max_rows: int | None = None,
    report: DataReport | None = None,
    one_a_prompt: bool = False,
) -> list[EvalRow]:
    """The held-out rows of `prepare`, in the order of their source; of more than `max_rows`, a seeded sample.

    Args:
        report: gets the counts of the sources that are read.
        one_a_prompt: rows with the same prompt are one row, the first, with the references of all.

    Raises:
        DataError: a row cannot be used, the rows are plain text (which asks nothing), or there are none.
    """
    groups: dict[Any, list[tuple[Encoded, Example]]] = {}
    for row, example in _held_out(section, tokenizer, seed, report or DataReport([])):
        key = split_key(example, seed) if one_a_prompt else (row.source, row.row)
        groups.setdefault(key, []).append((row, example))
    if not groups:
        raise DataError("no held-out row", fix="Check data.eval, or raise data.eval_fraction")
    held_out = list(groups.values())
    held_out = [held_out[k] for k in sample_of([rows[0][0] for rows in held_out], max_rows, seed)]
    paths = [source.path for source in section.sources()] + [section.eval or ""]
    return [_with_references([_eval_row(row, example, paths, tokenizer) for row, example in rows]) for rows in held_out]


def sample_of(rows: Sequence[Encoded], max_rows: int | None, seed: int) -> list[int]:
    """Positions of a seeded sample of at most `max_rows`, in order; all of them for None.

    By a hash of the place: a file sorted by label gives a fair sample, and a longer sample holds a shorter.
    """
    order = sorted(range(len(rows)), key=lambda k: _sample_key(rows[k], seed))
    return sorted(order[:max_rows])


def encode_choice(row: EvalRow, choice: str, tokenizer: Any) -> Encoded:
    """The row with `choice` for an answer; labels on the choice and its end of turn alone.

    Raises:
        RowError: the template refuses it.
    """
    if isinstance(row.example, Conversation):
        turns = row.example.messages[: row.example.last_assistant()]
        example: Example = Conversation((*turns, {"role": "assistant", "content": choice}), row.example.tools)
    else:
        example = PromptCompletion(row.example.prompt, choice)
    return replace(encode_whole(example, tokenizer, "last_turn"), source=row.source, row=row.row)


def completions_in(section: DataSection, limit: int = 50) -> list[str]:
    """The different completions of the training rows, sorted: the choices of a classification task.

    Raises:
        DataError: there are more than `limit`, or none.
    """
    found: set[str] = set()
    for source in section.sources():
        parser = RowParser(section, source)
        for raw in read_rows(source):
            if isinstance(raw.value, RowError):
                continue  # counted or refused where the rows are prepared
            try:
                found.add(_answer(parser.parse(raw.number, raw.value)))
            except RowError:
                continue
            if len(found) > limit:
                raise DataError(
                    f"more than {limit} different completions", fix="Name eval.choices, or another eval.answer"
                )
    if not found:
        raise DataError("no completion in the training rows", fix="Name eval.choices")
    return sorted(found)


def _answer(example: Example) -> str:
    if isinstance(example, PlainText):
        raise RowError("plain text has no completion", reason="no completion")
    if isinstance(example, PromptCompletion):
        return example.completion
    content = example.messages[example.last_assistant()].get("content")
    if not content:
        raise RowError("the answer is a tool call", reason="no completion")
    return content


def _held_out(section: DataSection, tokenizer: Any, seed: int, report: DataReport) -> Iterator[tuple[Encoded, Example]]:
    source = eval_source(section)
    plain = section.model_copy(update={"streaming": False})
    if source is not None:
        encoder = SourceEncoder(len(section.sources()), source, plain, tokenizer)
        report.eval = encoder.report
        yield from encoder.rows()
        return
    # As in `held_out_mask`, with only the rows below the threshold (or the lowest prompt's) kept in memory.
    below: list[tuple[Encoded, Example]] = []
    lowest: list[tuple[Encoded, Example]] = []
    low, total, threshold = 2**64, 0, int(section.eval_fraction * 2**64)
    for k, train_source in enumerate(section.sources()):
        encoder = SourceEncoder(k, train_source, plain, tokenizer)
        report.train.append(encoder.report)
        for row, example in encoder.rows():
            key, total = split_key(example, seed), total + 1
            if key < threshold:
                below.append((row, example))
            if key < low:
                low, lowest = key, []
            if key == low:
                lowest.append((row, example))
    yield from below if 0 < len(below) < total else lowest


def _sample_key(row: Encoded, seed: int) -> bytes:
    return hashlib.blake2b(f"{row.source}:{row.row}".encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()


def _with_references(rows: list[EvalRow]) -> EvalRow:
    """The first of rows with one prompt, with the references of all, each once."""
    return replace(rows[0], references=tuple(dict.fromkeys(text for row in rows for text in row.references)))


def _eval_row(row: Encoded, example: Example, paths: Sequence[str], tokenizer: Any) -> EvalRow:
    place = f"{paths[row.source]} row {row.row}"
    if isinstance(example, PlainText):
        raise DataError(f"{place}: plain text asks nothing that could be answered", fix="Set eval.answer: none")
    if isinstance(example, PromptCompletion) and tokenizer.chat_template is None:
        special = plain_special(tokenizer, example.prompt)
        ids = tokenizer(example.prompt, add_special_tokens=special)["input_ids"]
        ids = ids[:-1] if special and ids[-1:] == [tokenizer.eos_token_id] else ids
        accepted = (example.completion, *example.also)
        return EvalRow(np.array(ids, dtype=np.int32), example.completion, example, row.source, row.row, place, accepted)
    chat = example if isinstance(example, Conversation) else example.as_conversation()
    last = chat.last_assistant()
    prompt = render_chat(tokenizer, list(chat.messages[:last]), chat.tools, generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    message = chat.messages[last]
    completion = message.get("content") or ""
    if message.get("tool_calls"):  # as the template writes them: what a model would have to generate
        completion = find_spans(chat, tokenizer).last_said().removesuffix(end_of_turn(tokenizer))
    accepted = (completion, *(example.also if isinstance(example, PromptCompletion) else ()))
    return EvalRow(np.array(ids, dtype=np.int32), completion, example, row.source, row.row, place, accepted)
