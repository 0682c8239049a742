"""Share of rows whose predicted label is the reference label; scikit-learn underneath."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """`compute(predictions=, references=)` with one label a row, all text or all integers.

    Returns `accuracy` in 0..1 and `correct`, 0 or 1 a row.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of rows whose predicted label is the reference label.",
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.",
            inputs_description="predictions, references: [rows] labels, all text or all integers.",
            features=[
                datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
                for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        correct = [int(prediction == reference) for prediction, reference in zip(predictions, references, strict=True)]
        return {"accuracy": float(accuracy_score(references, predictions)), "correct": correct}
