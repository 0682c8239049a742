"""What `classify`, `rate`, `tag` and `answer` do once their options are read."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import tee
from pathlib import Path
from typing import Any, BinaryIO

from qlora_runtime.atomic import atomic_file
from qlora_runtime.console import warn_unverified
from qlora_runtime.errors import ArgumentError
from qlora_runtime.spans import Answer
from qlora_runtime.tagged import Sentence, Tagged
from qlora_runtime.task import ClassificationTask
from qlora_runtime.task_bundle import TaskBundle
from qlora_runtime.task_rows import JSONL, Row, RowWriter, check_writable, ending_of, read_rows
from qlora_runtime.texts import Classified, Rated, Text

PlacedRow = tuple[str, Row]  # FILE, line N; the row
Columns = dict[str, str]  # field: its column


def run_task_verb(options: argparse.Namespace, verb: str) -> None:
    """Asks the bundle about one text or a file of rows; answers go to stdout as JSON Lines, or to a file.

    Raises:
        WrongTaskError: the bundle is for another verb.
        ArgumentError: a file or a row is not as the verb wants it.
    """
    columns = _columns(options.column)
    for path in (options.input, options.output):
        if path is not None:
            ending_of(path)
    if options.input is not None and options.output is not None and _same(options.input, options.output):
        raise ArgumentError(f"{options.output} is the input. Give another --output.")
    bundle = TaskBundle.open(options.bundle, check_hashes=not options.no_hashes, threads=options.threads)
    warn_unverified(bundle.manifest)
    rows = (
        read_rows(options.input)
        if options.input is not None
        else iter([("the command line", _given(options))])
    )
    answers = answer_rows(bundle, verb, rows, columns, options.batch_size)
    if options.output is None:
        _write(answers, sys.stdout.buffer, JSONL)
        return
    with atomic_file(options.output) as file:
        _write(answers, file, ending_of(options.output))


def answer_rows(
    bundle: TaskBundle, verb: str, rows: Iterable[PlacedRow], columns: Columns, batch_size: int
) -> Iterator[Row]:
    """Each row with the answer's own columns behind its own, in order, one at a time.

    Raises:
        ArgumentError: while running, for a row that cannot be asked about, or has a column of the answer.
    """
    read, ask, tell = _KINDS[verb]

    def checked(place: str, row: Row) -> Any:
        _check_free(bundle, verb, place, row)
        check_writable(place, row)
        return read(place, row, columns)

    kept, asked = tee(rows)  # as far apart as the batches that are read ahead
    found = ask(bundle, (checked(place, row) for place, row in asked), batch_size)
    return ({**row, **tell(bundle, answer)} for (_, row), answer in zip(kept, found, strict=True))


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _check_free(bundle: TaskBundle, verb: str, place: str, row: Row) -> None:
    answer = _ANSWERS[verb]
    if isinstance(bundle.task, ClassificationTask):
        chosen = ("predicted_labels",) if bundle.task.multi_label else ("predicted_label", "probability")
        answer = (*chosen, *answer)
    if taken := [column for column in answer if column in row]:
        raise ArgumentError(
            f"{place}: the answer's columns {taken} are there already. Rename them in the input."
        )


def _columns(options: list[str]) -> Columns:
    pairs = [option.partition("=") for option in options]
    if wrong := [f"{name}{sign}{column}" for name, sign, column in pairs if not (name and column)]:
        raise ArgumentError(f"--column {wrong[0]}: expected FIELD=COLUMN, such as text=review.")
    return {name: column for name, _, column in pairs}


def _given(options: argparse.Namespace) -> Row:
    fields = ("text", "pair", "question", "context")
    return {name: value for name in fields if (value := getattr(options, name, None)) is not None}


def _write(rows: Iterable[Row], file: BinaryIO, ending: str) -> None:
    writer = RowWriter(file, ending)
    for row in rows:
        writer.write(row)


def _text(place: str, row: Row, columns: Columns) -> Text:
    first = _cell(place, row, columns, "text")
    return (first, _cell(place, row, columns, "pair")) if columns.get("pair", "pair") in row else first


def _sentence(place: str, row: Row, columns: Columns) -> Sentence:
    words = row.get(columns.get("words", "words"))
    if words is None:
        return _cell(place, row, columns, "text")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ArgumentError(f"{place}: words is {str(words)[:80]}, expected a list of words.")
    if not words or not all(word.strip() for word in words):
        raise ArgumentError(
            f"{place}: words is {str(words)[:80]}, expected words that are not blank. Fill them."
        )
    return words


def _question(place: str, row: Row, columns: Columns) -> tuple[str, str]:
    return _cell(place, row, columns, "question"), _cell(place, row, columns, "context")


def _cell(place: str, row: Row, columns: Columns, field: str) -> str:
    column = columns.get(field, field)
    value = row.get(column)
    if not isinstance(value, str):
        state = (
            f"{column} is {str(value)[:80]}" if column in row else f"no column {column!r} among {list(row)}"
        )
        raise ArgumentError(f"{place}: {state}, expected text. Name the column with --column {field}=COLUMN.")
    if not value.strip():
        raise ArgumentError(f"{place}: {column} is blank, expected text. Fill it, or leave the row out.")
    return value


def _tell_classified(bundle: TaskBundle, found: Classified) -> Row:
    assert isinstance(bundle.task, ClassificationTask)
    probabilities = dict(zip(bundle.task.labels, _rounded(found.probabilities.tolist()), strict=True))
    if bundle.task.multi_label:
        chosen: Row = {"predicted_labels": list(found.labels)}
    else:
        best = found.labels[0]
        chosen = {"predicted_label": best, "probability": probabilities[best]}
    return {**chosen, "probabilities": probabilities, "truncated": found.truncated}


def _tell_rated(bundle: TaskBundle, found: Rated) -> Row:
    return {"predicted_value": found.value, "truncated": found.truncated}


def _tell_tagged(bundle: TaskBundle, found: Tagged) -> Row:
    return {
        "predicted_words": [word.text for word in found.words],
        "predicted_tags": list(found.tags),
        "predicted_scores": _rounded(found.scores),
        "predicted_spans": [asdict(span) | {"score": round(span.score, 6)} for span in found.spans],
    }


def _tell_answer(bundle: TaskBundle, found: Answer) -> Row:
    cells = (found.text, found.start, found.end, round(found.score, 6))
    return dict(zip(_ANSWERS["answer"], cells, strict=True))


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 6) for value in values]


_ANSWERS = {  # verb: the columns of its answer, besides those of labels; the true ones may lie beside
    "classify": ("probabilities", "truncated"),
    "rate": ("predicted_value", "truncated"),
    "tag": ("predicted_words", "predicted_tags", "predicted_scores", "predicted_spans"),
    "answer": ("predicted_answer", "answer_start", "answer_end", "answer_score"),
}
Ask = Callable[[TaskBundle, Iterator[Any], int], Iterator[Any]]
_KINDS: dict[str, tuple[Callable[[str, Row, Columns], Any], Ask, Callable[[TaskBundle, Any], Row]]] = {
    # verb: (what is asked, how, and how the answer is told)
    "classify": (_text, TaskBundle.classify, _tell_classified),
    "rate": (_text, TaskBundle.rate, _tell_rated),
    "tag": (_sentence, TaskBundle.tag, _tell_tagged),
    "answer": (_question, TaskBundle.answer, _tell_answer),
}
