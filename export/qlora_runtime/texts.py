"""Texts and pairs of texts for classification and regression, and what is said of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qlora_runtime.encoder import FloatArray, Int64Array
from qlora_runtime.errors import ArgumentError
from qlora_runtime.tokenizer import check_text, plain_copy

Text = str | tuple[str, str]
"""A text, or a pair of texts."""


@dataclass(frozen=True)
class EncodedText:
    """A text, or a pair with a separator, as the model sees it: int64 [seq] each, special tokens included."""

    input_ids: Int64Array
    type_ids: Int64Array
    truncated: bool  # tokens were cut off, of a pair from the longer text first


@dataclass(frozen=True)
class Classified:
    """What a text is.

    Attributes:
        labels: the most probable label; where a text may have several, all with a probability above 0.5.
        probabilities: float64 [labels], in the order of the task's labels.
        truncated: the text was longer than the model reads.
    """

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    truncated: bool


@dataclass(frozen=True)
class Rated:
    """The number that a text is given."""

    value: float
    truncated: bool


class TextEncoder:
    """Texts as rows of at most `max_seq_len` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        """A copy of `tokenizer` is used."""
        self._tokenizer = plain_copy(tokenizer)
        self._tokenizer.enable_truncation(max_seq_len, strategy="longest_first")

    def encode(self, text: Text) -> EncodedText:
        """The text as one row, cut where it is too long.

        Raises:
            ArgumentError: the tokenizer makes nothing of it, or it holds half a surrogate pair.
        """
        first, second = text if isinstance(text, tuple) else (text, None)
        check_text(first, second or "")
        encoding = self._tokenizer.encode(first, second)
        if not encoding.ids:
            raise ArgumentError(f"the text {first!r} has no tokens, at least one is expected.")
        return EncodedText(
            np.array(encoding.ids, dtype=np.int64),
            np.array(encoding.type_ids, dtype=np.int64),
            bool(encoding.overflowing),
        )


def classified(logits: FloatArray, labels: tuple[str, ...], multi_label: bool, truncated: bool) -> Classified:
    """From logits float32 [labels]: softmax, or a sigmoid each where there may be several labels."""
    wide = logits.astype(np.float64)
    if multi_label:
        chosen = tuple(label for label, logit in zip(labels, wide, strict=True) if logit > 0)
        return Classified(chosen, 0.5 * (1 + np.tanh(0.5 * wide)), truncated)
    return Classified((labels[int(wide.argmax())],), softmax(wide), truncated)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
