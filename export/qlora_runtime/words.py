"""Words for tagging: a word's first token carries its tag, and BIO tags make spans.

Training and running use this same code, on the same `tokenizers` tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qlora_runtime.errors import ArgumentError
from qlora_runtime.tokenizer import check_text, plain_copy

Int64Array = npt.NDArray[np.int64]

NO_TOKEN = -1  # the place of a word of which the tokenizer makes nothing, such as a lone control character
_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Word:
    """A word of a text, and the characters [start, end) it stands at."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class EncodedWords:
    """Words as the model sees them.

    Attributes:
        input_ids, type_ids: int64 [seq], special tokens included.
        places: int64 [words], where each word's first token is; NO_TOKEN for a word without tokens.
        first_word: index of the first of these words in the sentence.
    """

    input_ids: Int64Array
    type_ids: Int64Array
    places: Int64Array
    first_word: int = 0


@dataclass(frozen=True)
class TagSpan:
    """Words [start, end) that BIO tags join to one span of a type."""

    type: str
    start: int
    end: int


class WordEncoder:
    """Sentences that are split into words already, as token ids."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        """A copy of `tokenizer` is used; `max_seq_len` tokens, special ones included, are a row's limit.

        Raises:
            ArgumentError: max_seq_len has no room beside the special tokens.
        """
        self._tokenizer, self._cutting = plain_copy(tokenizer), plain_copy(tokenizer)
        self._max_seq_len = max_seq_len
        self._room = max_seq_len - self._tokenizer.num_special_tokens_to_add(False)
        if self._room < 1:
            raise ArgumentError(f"max_seq_len is {max_seq_len}, which has no room beside the special tokens.")
        self._cutting.enable_truncation(max_seq_len)
        # A byte-level tokenizer knows a word in a sentence by the space before it.
        self._before = " " if _wants_a_space(json.loads(tokenizer.to_str())["pre_tokenizer"]) else ""

    def encode(self, words: Sequence[str]) -> list[EncodedWords]:
        """The sentence in one row; a longer one in several, cut between words.

        Raises:
            ArgumentError: there are no words, or one holds half a surrogate pair.
        """
        if not words:
            raise ArgumentError("a sentence without words, at least one is expected.")
        check_text(*words)
        spaced = [self._before + word for word in words]
        whole = self._tokenizer.encode(spaced, is_pretokenized=True)
        if len(whole.ids) <= self._max_seq_len:
            return [_encoded(whole, len(words), 0)]
        return [
            _encoded(self._cutting.encode(spaced[start:end], is_pretokenized=True), end - start, start)
            for start, end in self._cuts(whole, len(words))
        ]

    def _cuts(self, whole: Any, words: int) -> list[tuple[int, int]]:
        """Runs [start, end) of words whose tokens fit; a word with more tokens than fit stands alone."""
        ids = [word for word in whole.word_ids if word is not None]
        tokens = np.bincount(np.array(ids, dtype=np.int64), minlength=words)  # [words]
        cuts, start, used = [], 0, 0
        for word, count in enumerate(tokens):
            if used + count > self._room and word > start:
                cuts.append((start, word))
                start, used = word, 0
            used += int(count)
        return [*cuts, (start, words)]


def split_words(text: str) -> list[Word]:
    """The words of a raw text: letters and digits, joined by - or ', and each other mark alone."""
    return [Word(found.group(), found.start(), found.end()) for found in _WORD.finditer(text)]


def first_tokens(word_ids: Sequence[int | None], words: int) -> Int64Array:
    """Where each word's first token is, int64 [words]; NO_TOKEN for one without.

    Args:
        word_ids: [seq], the word that each token belongs to; None for special tokens.
    """
    places = np.full(words, NO_TOKEN, dtype=np.int64)
    for place, word in enumerate(word_ids):
        if word is not None and places[word] == NO_TOKEN:
            places[word] = place
    return places


def unread_tag(labels: Sequence[str]) -> str:
    """The tag of a word of which the tokenizer makes nothing: O, or where that is no label the first."""
    return "O" if "O" in labels else labels[0]


def bio_spans(tags: Sequence[str]) -> list[TagSpan]:
    """The spans of O, B-TYPE and I-TYPE; an I-TYPE that continues nothing of its type begins a span."""
    spans: list[TagSpan] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and spans and spans[-1].end == place and spans[-1].type == kind:
            spans[-1] = TagSpan(kind, spans[-1].start, place + 1)
        elif mark in ("B", "I") and kind:
            spans.append(TagSpan(kind, place, place + 1))
    return spans


def _encoded(encoding: Any, words: int, first_word: int) -> EncodedWords:
    return EncodedWords(
        np.array(encoding.ids, dtype=np.int64),
        np.array(encoding.type_ids, dtype=np.int64),
        first_tokens(encoding.word_ids, words),
        first_word,
    )


def _wants_a_space(pre_tokenizer: Any) -> bool:
    """Whether a byte-level pre-tokenizer is in there that does not write the space before a word itself."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("type") == "ByteLevel":
        return not pre_tokenizer.get("add_prefix_space")
    return any(_wants_a_space(part) for part in pre_tokenizer.get("pretokenizers", []))
