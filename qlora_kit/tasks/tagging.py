"""Tagging: a tag for each word, said at the word's first token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from qlora_runtime.words import NO_TOKEN, WordEncoder
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.task_examples import TaggedWords
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import TaggingSettings
from qlora_kit.tasks.encoding import backend, overlong
from qlora_kit.tasks.loss import label_losses
from qlora_kit.tasks.task import Task, without_labels

WHOLE = 1 << 30  # tokens: longer than any sentence


class Tagging(Task[TaggingSettings]):
    """Cross-entropy of each word's tag at its first token; the word's other tokens carry no loss."""

    auto_class = "AutoModelForTokenClassification"
    has_labels = True

    def encode(self, example: TaggedWords, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        """One row; of a sentence that is cut, the whole words that fit."""
        limit, row = section.max_seq_len, self._windows(example, tokenizer, WHOLE)[0]
        if cut := len(row.input_ids) > limit:
            if section.overlong != "truncate":
                raise overlong(len(row.input_ids), limit)
            row = self._windows(example, tokenizer, limit)[0]
        _require_labels([row], example)
        return [replace(row, truncated=cut)]

    def encode_whole(
        self, example: TaggedWords, tokenizer: PreTrainedTokenizerBase, section: DataSection
    ) -> list[Encoded]:
        """All windows of a long sentence, cut between words as the runtime cuts it, whatever data.overlong."""
        rows = self._windows(example, tokenizer, section.max_seq_len)
        _require_labels(rows, example)
        return rows

    def _windows(self, example: TaggedWords, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Encoded]:
        ids, rows = self.label_ids(example, "tag"), []
        for row in word_encoder(tokenizer, limit).encode(example.words):
            labels = np.full(len(row.input_ids), IGNORED, dtype=np.int32)
            for place, tag in zip(row.places, ids[row.first_word :]):
                if place != NO_TOKEN:
                    labels[place] = tag
            rows.append(Encoded(row.input_ids.astype(np.int32), labels))
        return rows

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return label_losses(model(**without_labels(batch)).logits, batch["labels"])

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Words."""
        return int((batch["labels"] != IGNORED).sum())

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        """The words, those with a tag other than O as `word⟦tag⟧`."""
        starts = [*np.flatnonzero(row.labels != IGNORED), len(row.labels)]
        parts = [row.input_ids[start:end] for start, end in pairwise(starts)]
        words = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts]
        tags = [self.labels[row.labels[start]] for start in starts[:-1]]
        return " ".join(word if tag == "O" else f"{word}⟦{tag}⟧" for word, tag in zip(words, tags))


def _require_labels(rows: list[Encoded], example: TaggedWords) -> None:
    if all((row.labels == IGNORED).all() for row in rows):
        raise RowError("the tokenizer makes nothing of these words", reason="no token", got=example.words)


@lru_cache(maxsize=4)
def word_encoder(tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> WordEncoder:
    """The runtime's encoder of split sentences, made once for a tokenizer."""
    return WordEncoder(backend(tokenizer), max_seq_len)
