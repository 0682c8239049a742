"""F1, precision and recall, per label and averaged, of one label a row or several; scikit-learn underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics.additive import AVERAGES, AdditiveScore, f1_score, label_counts
from qlora_kit.eval.metrics.inputs import Label, indicators, one_label_a_row


class F1(evaluate.Metric):
    """`compute(predictions=, references=, labels=None)`.

    Args:
        predictions, references: [rows] labels, all text or all whole numbers; or, where a row may have several,
            [rows][labels] of 0 and 1.
        labels: the labels there are (names of the columns of indicators); another one is an error. Left out, they
            are those that occur, or the numbers of the columns.

    Returns:
        All in 0..1: `f1` (the macro average), `f1_*`, `precision_*` and `recall_*` for macro, micro and weighted,
        `per_label` (label: precision, recall, f1, support), and `correct`, 0 or 1 a row. Averages run over labels
        that occur, with indicators over all; a label never predicted has precision 0, one never true recall 0.

    Raises:
        EvalError: an unknown label, a value that is no label or no indicator.
    """

    def _info(self) -> evaluate.MetricInfo:
        kinds = [datasets.Value("string"), datasets.Value("float64"), datasets.Sequence(datasets.Value("float64"))]
        return evaluate.MetricInfo(
            description="F1, precision and recall over labels.",
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.",
            inputs_description="predictions, references: [rows] labels, or [rows][labels] of 0 and 1.",
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], labels: list[Label] | None = None
    ) -> dict[str, Any]:
        predicted, true, names = _matrices(predictions, references, labels)
        averages = {
            f"{measure}_{average}": float(value)
            for average in AVERAGES
            for measure, value in zip(
                ("precision", "recall", "f1"),
                precision_recall_fscore_support(true, predicted, average=average, zero_division=0)[:3],
                strict=True,
            )
        }
        each = zip(names, *precision_recall_fscore_support(true, predicted, zero_division=0), strict=True)
        per_label = {
            str(name): {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in each
        }
        correct = (predicted == true).all(axis=1).astype(int).tolist()
        return {"f1": averages["f1_macro"], **averages, "per_label": per_label, "correct": correct}


def additive_score(
    predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Label] | None = None, average: str = "macro"
) -> AdditiveScore:
    """F1 as counts that add up over rows; arguments as in `F1`, `average` is macro, micro or weighted.

    Raises:
        EvalError: as `F1`; also another average.
    """
    predicted, true, _ = _matrices(predictions, references, labels)
    counts = label_counts(*true.shape, *(np.nonzero(matrix) for matrix in (predicted & true, predicted, true)))
    return f1_score(counts, average, every_label=_has_several(references))


def _matrices(
    predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Label] | None
) -> tuple[np.ndarray, np.ndarray, list[Label]]:
    """Indicators bool [rows, labels] of both sides, and the names of the columns."""
    if _has_several(references) != _has_several(predictions):
        raise EvalError("f1: one side has one label a row, the other has several", allowed="the same kind on both")
    if _has_several(references):
        width = len(labels) if labels is not None else len(references[0])
        true = indicators("f1", "references", references, width)
        predicted = indicators("f1", "predictions", predictions, width)
        return predicted > 0, true > 0, list(labels) if labels is not None else list(range(width))
    true_labels = one_label_a_row("f1", "references", references, labels)
    predicted_labels = one_label_a_row("f1", "predictions", predictions, labels)
    occurring = {*true_labels, *predicted_labels}
    names = (
        sorted(occurring, key=lambda name: (isinstance(name, str), name))
        if labels is None
        else [name for name in labels if name in occurring]
    )
    place = {name: column for column, name in enumerate(names)}
    one_hot = np.eye(len(names), dtype=bool)
    return one_hot[[place[name] for name in predicted_labels]], one_hot[[place[name] for name in true_labels]], names


def _has_several(rows: Sequence[Any]) -> bool:
    return not isinstance(rows[0], str) and isinstance(rows[0], Sequence | np.ndarray)
