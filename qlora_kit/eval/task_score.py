"""A score of a form's rows with its interval, and the paired difference of two forms' scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qlora_kit.eval.intervals import Interval
from qlora_kit.eval.metrics.additive import AdditiveScore, FloatArray
from qlora_kit.eval.score_intervals import (
    RowScore,
    bootstrap_additive,
    bootstrap_additive_difference,
    bootstrap_score,
    bootstrap_score_difference,
)


@dataclass(frozen=True)
class RankScore:
    """A score that is computed anew on each resample."""

    of_rows: RowScore
    rows: int


Score = AdditiveScore | RankScore


@dataclass(frozen=True)
class TaskScores:
    """One form's scores on all rows.

    Attributes:
        scores: the one the task is known by first.
        details: what stands behind them; plain data.
        correct: 0 or 1 a row; None where an answer is not right or wrong.
    """

    scores: dict[str, Score]
    details: dict[str, Any]
    correct: list[int] | None


def interval(score: Score, seed: int) -> Interval:
    """The score of all rows with its 95% bootstrap interval."""
    if isinstance(score, RankScore):
        return bootstrap_score(score.of_rows, score.rows, seed=seed)
    return bootstrap_additive(score, seed=seed)


def difference(a: Score, b: Score, seed: int) -> Interval:
    """The score a less b on the same resampled rows, with its 95% bootstrap interval."""
    if isinstance(a, RankScore) and isinstance(b, RankScore):
        return bootstrap_score_difference(a.of_rows, b.of_rows, a.rows, seed=seed)
    assert isinstance(a, AdditiveScore) and isinstance(b, AdditiveScore)
    return bootstrap_additive_difference(a, b, seed=seed)


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> AdditiveScore:
    """The mean of a value a row; with `weights` sum(values) / sum(weights), 0 where these sum to 0."""
    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)

    def of_sums(sums: FloatArray) -> FloatArray:
        return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)

    return AdditiveScore(np.stack([top, bottom], axis=1), of_sums)
