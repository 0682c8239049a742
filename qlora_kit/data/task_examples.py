"""What a row of a task means once read: labelled text, tagged words, a question on a text, a source and its target."""

from __future__ import annotations

from dataclasses import dataclass

Label = str | tuple[str, ...] | float
"""A name; names where a row may have several; a number to regress on."""


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and its label; None where rows are only to be predicted."""

    text: str
    pair: str | None
    label: Label | None


@dataclass(frozen=True)
class TaggedWords:
    """Words of a sentence and the tag of each; no tags where rows are only to be predicted."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


@dataclass(frozen=True)
class SplitText(TaggedWords):
    """The words that a raw text was split into, to be predicted."""


@dataclass(frozen=True)
class Answer:
    """An answer as it stands in the context, and the character where it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class QuestionOnText:
    """A question, the text to find its answer in, and all accepted answers: none where the text holds none."""

    question: str
    context: str
    answers: tuple[Answer, ...]
    id: str = ""


@dataclass(frozen=True)
class SourceTarget:
    """A text and what it is turned into; None where rows are only to be predicted."""

    source: str
    target: str | None
    also: tuple[str, ...] = ()
    """Targets that are as good: what is written is scored against them too, none is trained on."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its label; None where it is only to be predicted."""

    path: str
    label: str | None


@dataclass(frozen=True)
class Utterance:
    """An audio file and what is said in it; None where it is only to be predicted."""

    path: str
    text: str | None


TaskExample = LabelledText | TaggedWords | QuestionOnText | SourceTarget | LabelledImage | Utterance
