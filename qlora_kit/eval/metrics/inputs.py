"""What the metrics ask of their columns: each check names the metric, the column and the first row that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from qlora_kit.errors import EvalError

Label = str | int


def text_features(*, several: bool) -> list[datasets.Features]:
    """A text a row on both sides; with `several` also a list of references a row."""
    text = datasets.Value("string")
    kinds = (text, datasets.Sequence(text)) if several else (text,)
    return [datasets.Features({"predictions": text, "references": kind}) for kind in kinds]


def number_features() -> datasets.Features:
    """A number a row on both sides."""
    number = datasets.Value("float64")
    return datasets.Features({"predictions": number, "references": number})


def texts(metric: str, column: str, values: Sequence[Any]) -> list[str]:
    """[rows] texts.

    Raises:
        EvalError: a row is no text.
    """
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise EvalError(
                f"{metric}: row {row} of {column} is no text", got=value, allowed="a text, which may be empty"
            )
    return list(values)


def reference_texts(
    metric: str, references: Sequence[Any], *, none_allowed: bool = False, no_blank: bool = False
) -> list[list[str]]:
    """[rows][references]: one text a row becomes a list of one.

    Raises:
        EvalError: a row has no reference and `none_allowed` is false, one that is no text, or with `no_blank` one
            of white space alone.
    """
    rows = [[value] if isinstance(value, str) else list(value or ()) for value in references]
    for row, accepted in enumerate(rows):
        if not accepted and not none_allowed:
            raise EvalError(f"{metric}: row {row} has no reference", got=accepted, allowed="a text, or a list of texts")
        for text in accepted:
            if not isinstance(text, str) or (no_blank and not text.strip()):
                allowed = "a text with words" if no_blank else "a text, which may be empty"
                raise EvalError(f"{metric}: row {row} of references holds no text", got=text, allowed=allowed)
    return rows


def one_label_a_row(metric: str, column: str, values: Sequence[Any], known: Sequence[Label] | None) -> list[Label]:
    """[rows] labels, all text or all whole numbers.

    Args:
        known: the labels there are; None takes those that occur.

    Raises:
        EvalError: a row is neither text nor a whole number, or not among `known`.
    """
    rows = [_label(metric, column, row, value) for row, value in enumerate(values)]
    for row, label in enumerate(rows):
        if known is not None and label not in known:
            allowed = ", ".join(map(str, known))
            raise EvalError(f"{metric}: row {row} of {column} has an unknown label", got=label, allowed=allowed)
    return rows


def _label(metric: str, column: str, row: int, value: Any) -> Label:
    # evaluate casts a column of numbers to one type: whole ones arrive as floats.
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | np.number) and float(value).is_integer():
        return int(value)
    raise EvalError(f"{metric}: row {row} of {column} is no label", got=value, allowed="a text or a whole number")


def indicators(metric: str, column: str, values: Sequence[Any], labels: int | None) -> NDArray[np.int64]:
    """[rows, labels] of 0 and 1.

    Raises:
        EvalError: rows of different lengths, a length other than `labels`, or a value that is neither 0 nor 1.
    """
    width = len(values[0]) if labels is None else labels
    for row, value in enumerate(values):
        if len(value) != width or not width:
            raise EvalError(f"{metric}: row {row} of {column} has the wrong length", got=len(value), allowed=f"{width}")
        if any(number not in (0, 1) for number in value):
            raise EvalError(f"{metric}: row {row} of {column} is no indicator", got=list(value), allowed="0 and 1")
    return np.asarray(values, dtype=np.int64)


def finite_numbers(metric: str, column: str, values: Sequence[Any]) -> NDArray[np.float64]:
    """[rows] float64.

    Raises:
        EvalError: a row is no number, NaN or infinite.
    """
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise EvalError(f"{metric}: row {row} of {column} is no finite number", got=value)
    return np.asarray(values, dtype=np.float64)


def one_of(metric: str, option: str, value: str, allowed: Sequence[str]) -> str:
    """`value` where it is allowed.

    Raises:
        EvalError: it is not.
    """
    if value not in allowed:
        raise EvalError(f"{metric}: {option} is unknown", got=value, allowed=", ".join(allowed))
    return value


def correlatable(
    metric: str, predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sides as float64 [rows].

    Raises:
        EvalError: a row that is no finite number, fewer than two rows, or references that are all the same.
    """
    predicted = finite_numbers(metric, "predictions", predictions)
    true = finite_numbers(metric, "references", references)
    if len(true) < 2:
        raise EvalError(f"{metric}: too few rows to correlate", got=len(true), allowed="2 or more")
    if (true == true[0]).all():
        raise EvalError(f"{metric}: all references are the same", got=float(true[0]), fix="Use mse")
    return predicted, true
