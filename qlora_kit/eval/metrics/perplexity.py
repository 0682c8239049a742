"""Perplexity of a set of rows from each row's summed loss: every token weighs the same, long rows or short."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from qlora_kit.errors import EvalError


class Perplexity(evaluate.Metric):
    """`compute(loss=, loss_tokens=)`: summed loss in nats and number of loss tokens of each row.

    Returns `perplexity` = exp(sum of loss / sum of loss tokens), `loss` in nats a token, and `loss_tokens`.

    Raises:
        EvalError: a loss that is not finite, or rows without any loss token.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp(summed loss / loss tokens) over all rows.",
            citation="Jelinek et al., Perplexity - a measure of the difficulty of speech recognition tasks, 1977.",
            inputs_description="loss: [rows] summed nats. loss_tokens: [rows] tokens that carried loss.",
            features=datasets.Features({"loss": datasets.Value("float64"), "loss_tokens": datasets.Value("int64")}),
        )

    def _compute(self, loss: list[float], loss_tokens: list[int]) -> dict[str, Any]:
        bad = [row for row, value in enumerate(loss) if not math.isfinite(value)]
        if bad:
            raise EvalError(f"perplexity: the loss of row {bad[0]} is not finite", got=loss[bad[0]])
        tokens = sum(loss_tokens)
        if tokens < 1 or min(loss_tokens) < 0:
            raise EvalError("perplexity: no tokens carry loss", got=tokens, allowed="1 or more")
        mean = math.fsum(loss) / tokens
        return {"perplexity": math.exp(mean), "loss": mean, "loss_tokens": tokens}
