"""Pearson's correlation of predicted and true numbers; scipy underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
from scipy.stats import pearsonr

from qlora_kit.eval.metrics.additive import AdditiveScore, pearson_score
from qlora_kit.eval.metrics.inputs import correlatable, number_features


class Pearson(evaluate.Metric):
    """`compute(predictions=, references=)` with one number a row.

    Returns `pearson` in -1..1; 0 where the predictions do not vary, which no correlation is defined for.

    Raises:
        EvalError: fewer than two rows, a number that is not finite, or references that do not vary.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson correlation coefficient.",
            citation="Virtanen et al., SciPy 1.0, Nature Methods 17, 2020.",
            inputs_description="predictions, references: [rows] numbers.",
            features=number_features(),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        predicted, true = correlatable("pearson", predictions, references)
        varies = bool((predicted != predicted[0]).any())
        return {"pearson": float(pearsonr(predicted, true).statistic) if varies else 0.0}


def additive_score(predictions: Sequence[float], references: Sequence[float]) -> AdditiveScore:
    """Pearson's correlation as sums that add up over rows; arguments and errors as in `Pearson`."""
    return pearson_score(*correlatable("pearson", predictions, references))
