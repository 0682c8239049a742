"""Matthews correlation of predicted and true labels, two or more; scikit-learn underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import matthews_corrcoef

from qlora_kit.eval.metrics.additive import AdditiveScore, label_counts, matthews_score
from qlora_kit.eval.metrics.inputs import Label, one_label_a_row


class Matthews(evaluate.Metric):
    """`compute(predictions=, references=, labels=None)` with one label a row, all text or all whole numbers.

    Returns `matthews` in -1..1, 0 where all predictions or all references are one label.

    Raises:
        EvalError: a label that is not among `labels`, or a value that is no label.
    """

    def _info(self) -> evaluate.MetricInfo:
        kinds = [datasets.Value("string"), datasets.Value("float64")]
        return evaluate.MetricInfo(
            description="Matthews correlation coefficient.",
            citation="Matthews, Biochimica et Biophysica Acta 405, 1975; Gorodkin 2004 for more than two labels.",
            inputs_description="predictions, references: [rows] labels.",
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], labels: list[Label] | None = None
    ) -> dict[str, Any]:
        true = one_label_a_row("matthews", "references", references, labels)
        predicted = one_label_a_row("matthews", "predictions", predictions, labels)
        return {"matthews": float(matthews_corrcoef(true, predicted))}


def additive_score(
    predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Label] | None = None
) -> AdditiveScore:
    """Matthews correlation as counts that add up over rows; arguments and errors as in `Matthews`."""
    true = one_label_a_row("matthews", "references", references, labels)
    predicted = one_label_a_row("matthews", "predictions", predictions, labels)
    names = {name: column for column, name in enumerate(dict.fromkeys([*true, *predicted]))}
    rows = np.arange(len(true))
    true_column, predicted_column = np.array([names[n] for n in true]), np.array([names[n] for n in predicted])
    right = np.flatnonzero(true_column == predicted_column)
    cells = (right, true_column[right]), (rows, predicted_column), (rows, true_column)
    return matthews_score(label_counts(len(rows), len(names), *cells))
