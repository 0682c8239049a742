"""One form of a model (base, quantized base, tuned, merged, a bundle) scored on the held-out rows, and pairs of them.

Every form is scored on the same rows in the same order, so that two forms can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from qlora_kit.errors import EvalError
from qlora_kit.eval.intervals import (
    Interval,
    bootstrap_difference_of_means,
    bootstrap_difference_of_ratios,
    bootstrap_mean,
    bootstrap_ratio,
    exponentiate,
)
from qlora_kit.eval.metrics import compute_metric

MetricName = Literal["accuracy", "loss", "perplexity"]


@dataclass(frozen=True)
class PerRow:
    """One value a row, in the order of the scored rows."""

    loss: list[float]
    """Summed loss of the row in nats."""
    loss_tokens: list[int]
    """Tokens that carried loss."""
    correct: list[int] | None = None
    """1 where the answer is right, 0 where not; None where answers are not checked."""
    answer: list[Any] | None = None
    """The answer given: text, or what the task answers with (label, labels, number, tags); None if not checked."""


@dataclass(frozen=True)
class FormResult:
    """One form of the model on all rows."""

    loss: Interval
    """Nats a loss token, over all tokens of all rows; of other tasks a counted loss."""
    perplexity: Interval | None
    """None for tasks whose losses are not of tokens."""
    accuracy: Interval | None
    """Share of right answers, 0..1."""
    rows: int
    seconds: float
    """Wall time of the scoring."""
    per_row: PerRow
    scores: dict[str, Interval] = field(default_factory=dict)
    """A task's own scores, the one it is known by first; none of causal language modelling."""
    details: dict[str, Any] = field(default_factory=dict)
    """What stands behind the scores: precision, recall, F1 and support of each label or span type, a report."""


@dataclass(frozen=True)
class PairResult:
    """`metric` of form `a` less that of form `b`, on the same rows."""

    a: str
    b: str
    metric: str
    """A MetricName, or one of a task's scores."""
    difference: float
    low: float
    high: float
    disagree: float | None
    """Share of rows to which the two forms give other answers, 0..1; None without answers."""


def score_form(per_row: PerRow, seconds: float, *, seed: int = 0, resamples: int = 2000) -> FormResult:
    """The statistics of one form and their 95% bootstrap intervals from its values per row.

    Raises:
        EvalError: no rows, lengths that differ, a loss that is not finite, a row without loss tokens.
    """
    rows = len(per_row.loss)
    for name in ("loss_tokens", "correct", "answer"):
        column = getattr(per_row, name)
        if column is not None and len(column) != rows:
            raise EvalError(f"{name}: {len(column)} values for {rows} rows", fix="Score every form on the same rows")
    loss = bootstrap_ratio(per_row.loss, per_row.loss_tokens, seed=seed, resamples=resamples)
    accuracy = None
    if per_row.correct is not None:
        accuracy = bootstrap_mean(per_row.correct, seed=seed, resamples=resamples, name="correct")
    value = compute_metric("perplexity", loss=per_row.loss, loss_tokens=per_row.loss_tokens)["perplexity"]
    perplexity = replace(exponentiate(loss), value=value)
    return FormResult(loss, perplexity, accuracy, rows, seconds, per_row)


def compare_forms(
    forms: dict[str, FormResult], a: str, b: str, metric: MetricName, *, seed: int = 0, resamples: int = 2000
) -> PairResult:
    """The paired difference `a` - `b` in one metric with its 95% bootstrap interval.

    Raises:
        EvalError: a form or metric is missing, or the two were scored on different rows.
    """
    missing = [name for name in (a, b) if name not in forms]
    if missing:
        raise EvalError(f"no form {missing[0]} among the results", allowed=", ".join(forms))
    left, right = forms[a].per_row, forms[b].per_row
    if metric == "accuracy":
        if left.correct is None or right.correct is None:
            raise EvalError(f"{a} and {b} cannot be compared in accuracy: answers were not checked")
        interval = bootstrap_difference_of_means(left.correct, right.correct, seed=seed, resamples=resamples)
    else:
        interval = bootstrap_difference_of_ratios(
            (left.loss, left.loss_tokens),
            (right.loss, right.loss_tokens),
            transform=np.exp if metric == "perplexity" else np.asarray,
            seed=seed,
            resamples=resamples,
            name=metric,
        )
    disagree = disagreement(left.answer, right.answer)
    return PairResult(a, b, metric, interval.value, interval.low, interval.high, disagree)


def disagreement(a: Sequence[Any] | None, b: Sequence[Any] | None) -> float | None:
    """Share of rows with other answers, 0..1; None without answers."""
    if a is None or b is None:
        return None
    return sum(left != right for left, right in zip(a, b, strict=True)) / len(a)
