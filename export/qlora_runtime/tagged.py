"""Sentences for tagging, and the tags and spans found in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_runtime.encoder import FloatArray
from qlora_runtime.task import TaggingTask
from qlora_runtime.texts import softmax
from qlora_runtime.words import NO_TOKEN, EncodedWords, Word, bio_spans, split_words, unread_tag

Sentence = str | Sequence[str]
"""A raw text, or the words of a sentence."""


@dataclass(frozen=True)
class FoundSpan:
    """A span of one type, at characters [start, end); `score` is the mean probability of its words' tags."""

    type: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Tagged:
    """A sentence with its tags.

    Attributes:
        text: the sentence; of words, these joined by single spaces. Offsets count its characters.
        words: [words], with their characters.
        tags, scores: [words], each word's tag and its probability. A word of which the tokenizer makes
            nothing has O, or where that is no label the first, with probability 0.
        spans: what BIO tags join; empty for plain tags.
    """

    text: str
    words: tuple[Word, ...]
    tags: tuple[str, ...]
    scores: tuple[float, ...]
    spans: tuple[FoundSpan, ...]


def placed_words(sentence: Sentence) -> tuple[str, list[Word]]:
    """The text of a sentence, and its words with their characters in it."""
    if isinstance(sentence, str):
        return sentence, split_words(sentence)
    words, at = [], 0
    for word in sentence:
        words.append(Word(word, at, at + len(word)))
        at += len(word) + 1
    return " ".join(sentence), words


def tagged(
    text: str,
    words: Sequence[Word],
    rows: Sequence[EncodedWords],
    logits: Sequence[FloatArray],
    task: TaggingTask,
) -> Tagged:
    """Tags from the logits at each word's first token; logits: [seq, labels] of each row."""
    tags, scores = [unread_tag(task.labels)] * len(words), [0.0] * len(words)
    for row, found in zip(rows, logits, strict=True):
        for word, place in enumerate(row.places, start=row.first_word):
            if place == NO_TOKEN:
                continue
            probabilities = softmax(found[place].astype(np.float64))  # [labels]
            best = int(probabilities.argmax())
            tags[word], scores[word] = task.labels[best], float(probabilities[best])
    spans = (
        [
            _found(text, words[span.start : span.end], span.type, scores[span.start : span.end])
            for span in bio_spans(tags)
        ]
        if task.scheme == "bio"
        else []
    )
    return Tagged(text, tuple(words), tuple(tags), tuple(scores), tuple(spans))


def _found(text: str, words: Sequence[Word], kind: str, scores: Sequence[float]) -> FoundSpan:
    start, end = words[0].start, words[-1].end
    return FoundSpan(kind, text[start:end], start, end, sum(scores) / len(scores))
