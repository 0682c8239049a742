"""Mean squared error of predicted numbers; scikit-learn underneath."""

from __future__ import annotations

from typing import Any

import evaluate
from sklearn.metrics import mean_squared_error

from qlora_kit.eval.metrics.inputs import finite_numbers, number_features


class Mse(evaluate.Metric):
    """`compute(predictions=, references=)` with one number a row.

    Returns `mse` in the square of the numbers' unit, and `squared_errors`, one a row.

    Raises:
        EvalError: a number that is not finite.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean of the squared differences.",
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.",
            inputs_description="predictions, references: [rows] numbers.",
            features=number_features(),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        predicted = finite_numbers("mse", "predictions", predictions)
        true = finite_numbers("mse", "references", references)
        return {
            "mse": float(mean_squared_error(true, predicted)),
            "squared_errors": ((predicted - true) ** 2).tolist(),
        }
