"""Texts and pairs of texts as tokens, with the tokenizer's own special tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import Encoded
from qlora_kit.recipe import DataSection


def encode_texts(text: str, pair: str | None, labels: np.ndarray, tokenizer: Any, section: DataSection) -> Encoded:
    """One text, or two with a separator between them, and the row's labels (int32 [n]).

    Raises:
        RowError: it has more tokens than data.max_seq_len, and data.overlong does not say to cut.
    """
    out = tokenizer(text, pair, return_token_type_ids=True, verbose=False)
    limit, cut = section.max_seq_len, len(out["input_ids"]) > section.max_seq_len
    if cut and section.overlong != "truncate":
        raise overlong(len(out["input_ids"]), limit)
    if cut:
        out = tokenizer(text, pair, return_token_type_ids=True, truncation="longest_first", max_length=limit)
    ids = np.array(out["input_ids"], dtype=np.int32)
    second = second_text(np.array(out["token_type_ids"])) if pair is not None else -1
    return Encoded(ids, labels, truncated=cut, second=second)


def second_text(type_ids: np.ndarray) -> int:
    """The token where the second of two texts starts, by the types of all tokens (int [seq]); -1 where none says so."""
    return int(np.argmax(type_ids)) if type_ids.any() else -1


def backend(tokenizer: Any) -> Tokenizer:
    """The tokenizer of the package `tokenizers` inside one of transformers: what the runtime reads from its file."""
    inner: Tokenizer = tokenizer.backend_tokenizer
    return inner


def overlong(tokens: int, limit: int) -> RowError:
    """A row with more tokens than data.max_seq_len."""
    return RowError(
        f"{tokens} tokens, more than data.max_seq_len {limit}",
        reason="overlong",
        fix="Raise data.max_seq_len, or set data.overlong to skip or truncate",
    )
