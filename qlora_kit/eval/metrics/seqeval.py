"""Precision, recall and F1 of spans from BIO tags; the seqeval library underneath."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics.additive import AVERAGES, AdditiveScore, f1_score, label_counts

_BIO = re.compile(r"O|[BI]-.+")
Tags = Sequence[Sequence[str]]


class Seqeval(evaluate.Metric):
    """`compute(predictions=, references=)` with [rows][words] BIO tags.

    A span is right where its type and both its ends are. An I-TYPE that follows no B- or I- of its type starts a
    span, as in conlleval.

    Returns:
        All in 0..1: `f1`, `precision` and `recall` (micro averages), `f1_*`, `precision_*` and `recall_*` for macro,
        micro and weighted, `per_type` (type: precision, recall, f1, support), and `correct`: 1 for a row whose spans
        are all right and no more. Where no span is predicted or true, its ratios are 0.

    Raises:
        EvalError: a row with more or fewer predicted tags than words, or a tag that is not BIO.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Precision, recall and F1 of spans.",
            citation="Ramshaw and Marcus, Text Chunking using Transformation-Based Learning, 1995; Nakayama, seqeval.",
            inputs_description="predictions, references: [rows][words] tags O, B-TYPE, I-TYPE.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, Any]:
        predicted, true = _spans(predictions, references)
        types = sorted({span[0] for spans in (*predicted, *true) for span in spans})
        averages: dict[str, float] = {}
        for average in AVERAGES:
            averages |= _three(references, predictions, average) if types else dict.fromkeys(_keys(average), 0.0)
        measures = [] if not types else precision_recall_fscore_support(references, predictions, zero_division=0)
        per_type = {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(types, *measures)
        }
        micro = {name: averages[f"{name}_micro"] for name in ("f1", "precision", "recall")}
        correct = [int(a == b) for a, b in zip(predicted, true, strict=True)]
        return {**micro, **averages, "per_type": per_type, "correct": correct}


def span_report(predictions: Tags, references: Tags, digits: int = 2) -> str:
    """The table of seqeval: precision, recall, F1 and support of each type, then the averages.

    Args:
        predictions, references: [rows][words] BIO tags.
        digits: decimals of the ratios.

    Raises:
        EvalError: as `Seqeval`; also tags without any span.
    """
    predicted, true = _spans(predictions, references)
    if not any(predicted) and not any(true):
        raise EvalError("seqeval: no span to report on", allowed="at least one B- or I- tag on either side")
    rows = [list(row) for row in references], [list(row) for row in predictions]
    return str(classification_report(*rows, digits=digits, zero_division=0))


def additive_score(predictions: Tags, references: Tags, average: str = "micro") -> AdditiveScore:
    """F1 of spans as counts that add up over rows; `average` is micro, macro or weighted.

    Raises:
        EvalError: as `Seqeval`; also another average.
    """
    predicted, true = _spans(predictions, references)
    types = {name: column for column, name in enumerate(sorted({s[0] for row in (*predicted, *true) for s in row}))}

    def cells(rows: list[set[tuple[str, int, int]]]) -> tuple[np.ndarray, np.ndarray]:
        where = [(row, types[span[0]]) for row, spans in enumerate(rows) for span in spans]
        return tuple(np.array(where, dtype=np.int64).reshape(-1, 2).T)  # type: ignore[return-value]

    right = [a & b for a, b in zip(predicted, true, strict=True)]
    counts = label_counts(len(true), len(types), cells(right), cells(predicted), cells(true))
    return f1_score(counts, average)


def _spans(predictions: Tags, references: Tags) -> tuple[list[set[tuple[str, int, int]]], ...]:
    """Spans (type, first word, last word) of each row, of predictions and of references."""
    for row, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(true):
            got = (len(predicted), len(true))
            raise EvalError(f"seqeval: row {row} has another number of predicted tags than of words", got=got)
        for column, tags in (("predictions", predicted), ("references", true)):
            bad = [tag for tag in tags if not isinstance(tag, str) or not _BIO.fullmatch(tag)]
            if bad:
                raise EvalError(
                    f"seqeval: row {row} of {column} has a tag that is not BIO",
                    got=bad[0],
                    allowed="O, B-TYPE, I-TYPE",
                )
    return tuple([set(get_entities(list(row))) for row in side] for side in (predictions, references))


def _keys(average: str) -> list[str]:
    return [f"{measure}_{average}" for measure in ("precision", "recall", "f1")]


def _three(references: Tags, predictions: Tags, average: str) -> dict[str, float]:
    values = precision_recall_fscore_support(references, predictions, average=average, zero_division=0)
    return {key: float(value) for key, value in zip(_keys(average), values)}
