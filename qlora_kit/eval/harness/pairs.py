"""Intervals of benchmark scores, and paired differences of two forms on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_kit.errors import EvalError
from qlora_kit.eval.harness.results import Metric, RowValue, TaskScore
from qlora_kit.eval.intervals import (
    FEWEST_ROWS,
    FloatArray,
    Interval,
    bootstrap_difference_of_means,
    bootstrap_difference_of_ratios,
    bootstrap_ratio,
)

_Z = 1.959964  # of the standard normal distribution, two-sided 95%


def _bits(nats: FloatArray) -> FloatArray:
    return nats / math.log(2)


# Metrics over whole texts: what they make of nats a unit.
PER_UNIT: dict[str, Callable[[FloatArray], FloatArray]] = {
    "word_perplexity": np.exp,
    "byte_perplexity": np.exp,
    "bits_per_byte": _bits,
}


@dataclass(frozen=True)
class Pair:
    """`metric` of form `a` less that of form `b`."""

    a: str
    b: str
    task: str
    metric: str
    rows: int
    difference: float
    low: float
    high: float
    share: bool


def metric_of(name: str, value: float, stderr: Any, per_row: Sequence[RowValue], higher_is_better: bool) -> Metric:
    """A metric with its 95% interval: 1.96 of lm-eval's standard errors to each side (a share ends at 0 and 1); for
    perplexities, to which lm-eval gives no error, a bootstrap over rows. None where all rows score alike.
    """
    share = bool(per_row) and all(not isinstance(row, list) and 0 <= row <= 1 for row in per_row)
    if isinstance(stderr, int | float) and math.isfinite(stderr) and stderr > 0:  # 0: all rows alike, which says little
        low, high = value - _Z * stderr, value + _Z * stderr
        if share:
            low, high = max(0.0, low), min(1.0, high)
        return Metric(value, low, high, higher_is_better, share)
    transform = PER_UNIT.get(_plain(name))
    if transform is not None and len(per_row) >= FEWEST_ROWS:
        found = bootstrap_ratio(*_losses(per_row), name=name)
        low, high = (float(transform(np.asarray(end))) for end in (found.low, found.high))
        return Metric(value, low, high, higher_is_better, share)
    return Metric(value, None, None, higher_is_better, share)


def why_not_comparable(a: TaskScore, b: TaskScore) -> str | None:
    """What keeps two scores of a task from being compared row by row; None where nothing does."""
    if a.rows != b.rows:
        return f"{a.rows} and {b.rows} rows"
    if a.few_shot != b.few_shot:
        return f"{a.few_shot} and {b.few_shot} examples in the prompt"
    return None if a.fingerprint == b.fingerprint else "other rows or prompts"


def compare_scores(
    a: tuple[str, dict[str, TaskScore]], b: tuple[str, dict[str, TaskScore]], task: str, metric: str
) -> Pair:
    """The paired difference a - b with its 95% bootstrap interval.

    Args:
        a, b: (name, scores by task), each with `task`; for a group its tasks too.

    Raises:
        EvalError: the two were scored on other rows.
    """
    (a_name, a_scores), (b_name, b_scores) = a, b
    if reason := why_not_comparable(a_scores[task], b_scores[task]):
        raise EvalError(f"{task}: {a_name} and {b_name} were scored on other rows: {reason}", fix="Score both alike")
    left, right = rows_of(a_scores, task, metric), rows_of(b_scores, task, metric)
    transform = PER_UNIT.get(_plain(metric))
    if transform is None:
        found: Interval = bootstrap_difference_of_means(left, right, name=metric)
    else:
        found = bootstrap_difference_of_ratios(_losses(left), _losses(right), transform=transform, name=metric)
    share = a_scores[task].metrics[metric].share
    return Pair(a_name, b_name, task, metric, len(left), found.value, found.low, found.high, share)


def rows_of(scores: dict[str, TaskScore], task: str, metric: str) -> list[Any]:
    """The values per row of a task; of a group, those of its tasks one after the other. Empty where they say nothing
    about the metric: its value is no mean over rows.
    """
    score = scores[task]
    if not score.tasks:
        values: list[Any] = list(score.per_row.get(metric, []))
    else:
        values = [row for name in score.tasks if name in scores for row in scores[name].per_row.get(metric, [])]
    if _plain(metric) in PER_UNIT:
        return values
    numbers = values and not any(isinstance(row, list) for row in values)
    means = numbers and math.isclose(float(np.mean(values)), score.metrics[metric].value, rel_tol=1e-6, abs_tol=1e-9)
    return values if means and len(values) == score.rows else []


def _plain(metric: str) -> str:
    return metric.split(" ")[0]


def _losses(rows: Sequence[Any]) -> tuple[list[float], list[float]]:
    """(nats, units) of rows of [log-probability, units]."""
    return [-row[0] for row in rows], [row[1] for row in rows]
