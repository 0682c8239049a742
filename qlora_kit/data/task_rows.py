"""What the cells of a row mean to each task."""

from __future__ import annotations

from typing import Any

import numpy as np
from qlora_runtime.words import split_words

from qlora_kit.data.examples import RowError
from qlora_kit.data.task_columns import Cells, check_characters
from qlora_kit.data.task_examples import Answer, LabelledText, QuestionOnText, SourceTarget, SplitText, TaggedWords
from qlora_kit.data.task_labels import check_label, label_name
from qlora_kit.task_settings import (
    ClassificationSettings,
    QuestionAnsweringSettings,
    TaggingSettings,
)

MOST = float(np.finfo(np.float32).max)
"""The largest label of regression, which is trained in float32."""


def classified(cells: Cells, settings: ClassificationSettings, labelled: bool) -> LabelledText:
    """A text, or a pair, and its label or labels.

    Raises:
        RowError: a cell is empty or of the wrong kind, or a label unknown.
    """
    text, pair = _texts(cells)
    if not labelled:
        return LabelledText(text, pair, None)
    if settings.multi_label:
        return LabelledText(text, pair, _several_labels(cells, settings))
    return LabelledText(text, pair, label_name(cells.value("label"), settings.labels, cells.name("label")))


def rated(cells: Cells, labelled: bool) -> LabelledText:
    """A text, or a pair, and a number; text that is a number counts as one.

    Raises:
        RowError: a cell is empty, or the number none or not finite.
    """
    text, pair = _texts(cells)
    return LabelledText(text, pair, _number(cells.value("label"), cells.name("label")) if labelled else None)


def tagged(cells: Cells, settings: TaggingSettings, labelled: bool) -> tuple[TaggedWords, int]:
    """The words of a sentence with their tags, and how many tags were repaired. A raw text that is only to be tagged is
    split into words as bundles split it.

    Raises:
        RowError: words and tags are no lists of one length, a word is empty, or a tag unknown or out of place.
    """
    if not labelled and isinstance(cells.get("words"), str):
        return SplitText(tuple(word.text for word in split_words(cells.text("words"))), None), 0
    words = _list(cells, "words")
    for k, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"{cells.name('words')}[{k}] is no word", reason="empty word", got=word)
        check_characters(word, f"{cells.name('words')}[{k}]")
    if not labelled:
        return TaggedWords(tuple(words), None), 0
    column = cells.name("tags")
    tags = _list(cells, "tags")
    if len(tags) != len(words):
        problem = f"{len(words)} {cells.name('words')}, but {len(tags)} {column}"
        raise RowError(problem, reason="lengths differ", fix="Give each word one tag")
    names = [_tag(tag, settings.labels, f"{column}[{k}]") for k, tag in enumerate(tags)]
    repaired = 0
    if settings.scheme == "bio":
        names, repaired = _spans(names, words, column, settings.broken_spans == "repair")
    for k, name in enumerate(names):
        check_label(name, settings.labels, f"{column}[{k}]")
    return TaggedWords(tuple(words), tuple(names)), repaired


def asked(cells: Cells, settings: QuestionAnsweringSettings, labelled: bool) -> QuestionOnText:
    """A question on a text, and its answers as they stand in it.

    Raises:
        RowError: a cell is empty, an answer does not stand where it should, or there is none and that is not allowed.
    """
    question, context = cells.text("question"), cells.text("context")
    name = str(cells.get("id") or "")
    if not labelled:
        return QuestionOnText(question, context, (), name)
    who = f"id {name!r}: " if name else ""
    answers = [_answer(*pair, context, f"{who}answer {k}") for k, pair in enumerate(_answer_pairs(cells, who), 1)]
    impossible = cells.get("is_impossible")
    if impossible is not None and bool(impossible) == bool(answers):
        problem = f"{who}is_impossible is {impossible}, but there are {len(answers)} answers"
        raise RowError(problem, reason="contradictory answers", fix="Mend one of the two")
    if not answers and not settings.unanswerable:
        fix = "Set task.unanswerable: true (SQuAD v2), or data.bad_rows: skip"
        raise RowError(f"{who}no answer", reason="no answer", fix=fix)
    return QuestionOnText(question, context, tuple(answers), name)


def turned(cells: Cells, labelled: bool) -> SourceTarget:
    """A source and its target, or a list of targets that are as good; the first is the one to learn.

    Raises:
        RowError: one of them is missing, empty or no text.
    """
    source = cells.text("source")
    if not labelled:
        return SourceTarget(source, None)
    if not isinstance(cells.get("target"), list):
        return SourceTarget(source, cells.text("target"))
    places = [f"{cells.name('target')}[{k}]" for k in range(len(_list(cells, "target")))]
    each = dict(zip(places, cells.value("target")))
    target, *also = [Cells(each, {"target": place}).text("target") for place in places]
    return SourceTarget(source, target, tuple(also))


def _texts(cells: Cells) -> tuple[str, str | None]:
    return cells.text("text"), cells.text("pair") if "pair" in cells.columns else None


def _several_labels(cells: Cells, settings: ClassificationSettings) -> tuple[str, ...]:
    value, column = cells.value("label"), cells.name("label")
    if isinstance(value, str):
        value = [part for part in value.split(settings.label_separator) if value.strip()]
    if not isinstance(value, list):
        allowed = f"a list of labels, or text with {settings.label_separator!r} between them"
        raise RowError(f"{column} is {type(value).__name__}", reason=f"{column} no list", got=value, allowed=allowed)
    if not settings.labels and len(value) > 1 and all(type(part) is int and part in (0, 1) for part in value):
        raise RowError(
            f"{column} is a list of 0 and 1, which may be labels, or a mark for each label",
            reason=f"{column} of 0 and 1",
            got=value,
            allowed="the names of the labels that the row has",
            fix="Write names; where they are numbers of labels, set task.labels",
        )
    names = tuple(label_name(part, settings.labels, f"{column}[{k}]") for k, part in enumerate(value))
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise RowError(f"{column} names {', '.join(doubled)} twice", reason="label twice", got=value)
    return names


def _number(value: Any, column: str) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if plain or (isinstance(value, str) and "_" not in value) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise RowError(
            f"{column} is no number", reason=f"{column} no number", got=value, allowed="a number such as 3.5"
        )
    if not abs(number) <= MOST:
        allowed = f"numbers of float32: -{MOST:.4g} to {MOST:.4g}"
        raise RowError(f"{column} is not finite", reason=f"{column} not finite", got=value, allowed=allowed)
    return number


def _list(cells: Cells, field: str) -> list[Any]:
    value, column = cells.value(field), cells.name(field)
    if not isinstance(value, list):
        fix = "Cells of a CSV hold no lists: use .jsonl, .parquet or .conll"
        raise RowError(
            f"{column} is {type(value).__name__}, not a list", reason=f"{column} no list", got=value, fix=fix
        )
    if not value:
        raise RowError(f"{column} is empty", reason=f"empty {column}", fix="Fill it, or set data.bad_rows: skip")
    return value


def _tag(value: Any, labels: list[str], place: str) -> str:
    if isinstance(value, int) and not labels:
        fix = "List the tags' names in their order under task.labels"
        raise RowError(f"{place} is the number {value}, which has no name", reason="tag without name", fix=fix)
    return label_name(value, labels if isinstance(value, int) else (), place)


def _spans(tags: list[str], words: list[str], column: str, repair: bool) -> tuple[list[str], int]:
    """The tags, each I-TYPE after a B-TYPE or I-TYPE; how many were made B-TYPE for that."""
    out, repaired, before = [], 0, "O"
    for k, (tag, word) in enumerate(zip(tags, words)):
        mark, _, kind = tag.partition("-")
        if tag != "O" and (mark not in ("B", "I") or not kind):
            raise RowError(
                f"{column}[{k}] of {word!r} is no BIO tag",
                reason="no BIO tag",
                got=tag,
                allowed="O, B-TYPE, I-TYPE",
                fix="For tags that mark no spans set task.scheme: plain",
            )
        if mark == "I" and before not in (f"B-{kind}", f"I-{kind}"):
            if not repair:
                raise RowError(
                    f"{column}[{k}] of {word!r} is {tag} after {before}: the span has no beginning",
                    reason="broken span",
                    fix=f"Make it B-{kind}, or set task.broken_spans: repair",
                )
            tag, repaired = f"B-{kind}", repaired + 1
        out.append(tag)
        before = tag
    return out, repaired


def _answer_pairs(cells: Cells, who: str) -> list[tuple[Any, Any]]:
    """(text, start) of each answer, from a list of objects (SQuAD) or an object of lists (datasets)."""
    value, column = cells.value("answers"), cells.name("answers")
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        texts, starts = value["text"], value["answer_start"]
        if len(texts) != len(starts):
            problem = f"{who}{len(texts)} {column}.text, but {len(starts)} {column}.answer_start"
            raise RowError(problem, reason="lengths differ")
        return list(zip(texts, starts))
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return [(part.get("text"), part.get("answer_start")) for part in value]
    allowed = "[{text, answer_start}, ...] or {text: [...], answer_start: [...]}"
    raise RowError(f"{who}{column} holds no answers", reason=f"{column} unreadable", got=value, allowed=allowed)


def _answer(text: Any, start: Any, context: str, place: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{place} has no text", reason="empty answer", got=text)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        allowed = "the character of the context, counted from 0, where the answer starts"
        raise RowError(f"{place} has no answer_start", reason="no answer_start", got=start, allowed=allowed)
    there = context[start : start + len(text)]
    if there != text:
        at = context.find(text)
        fix = f"The context has it at {at}" if at >= 0 else "The context does not have it at all"
        problem = f"{place} {text!r} should start at {start}, where the context has {there!r}"
        raise RowError(problem, reason="answer not in place", fix=fix)
    return Answer(text, start)
