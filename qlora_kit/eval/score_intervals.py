"""Bootstrap intervals of scores that are no mean over rows: macro F1, Matthews correlation, span F1, corpus BLEU.

A score whose rows add up (`AdditiveScore`) costs a weighted sum of its counts a resample; any other is computed anew.
Same seed, same resampled rows: both ways give the same interval, and so do two forms that are compared in pairs.

Sources: as qlora_kit/eval/intervals.py; Koehn 2004 for the paired bootstrap of corpus BLEU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qlora_kit.errors import EvalError
from qlora_kit.eval.intervals import Interval, bootstrap
from qlora_kit.eval.metrics.additive import AdditiveScore

Indices = NDArray[np.int64]
FloatArray = NDArray[np.float64]
RowScore = Callable[[Indices], float]
"""The score of the rows at int64 [rows] indices, a row as often as it is named."""


def bootstrap_score(
    score: RowScore, rows: int, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of any score of a set of rows, computed anew on each resample.

    Args:
        score: gives the score of the rows it is told.
        rows: how many rows there are.
        samples: bootstrap samples drawn.
        confidence: coverage, between 0 and 1.
        seed: same seed, same interval.

    Raises:
        EvalError: no rows, a score that is not finite, or an impossible `confidence` or `samples`.
    """
    return _of_resamples(
        rows, lambda index: np.array([score(drawn) for drawn in index], dtype=np.float64), samples, confidence, seed
    )


def bootstrap_score_difference(
    a: RowScore, b: RowScore, rows: int, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a - b, both scored on the same resampled rows; arguments and errors as in `bootstrap_score`."""
    return bootstrap_score(lambda index: a(index) - b(index), rows, samples=samples, confidence=confidence, seed=seed)


def bootstrap_additive(
    score: AdditiveScore, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of a score whose rows add up; arguments and errors as in `bootstrap_score`."""
    return _of_resamples(score.rows, lambda index: _resampled(score, _times_drawn(index)), samples, confidence, seed)


def bootstrap_additive_difference(
    a: AdditiveScore, b: AdditiveScore, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a - b on the same resampled rows, row i of both being the same row of data.

    Arguments as in `bootstrap_score`.

    Raises:
        EvalError: as `bootstrap_score`; also different numbers of rows.
    """
    if a.rows != b.rows:
        raise EvalError("the two sides have different rows", got=(a.rows, b.rows), fix="Score both on the same rows")

    def difference(index: Indices) -> FloatArray:
        weights = _times_drawn(index)
        return _resampled(a, weights) - _resampled(b, weights)

    return _of_resamples(a.rows, difference, samples, confidence, seed)


def _of_resamples(
    rows: int, statistic: Callable[[Indices], FloatArray], samples: int, confidence: float, seed: int
) -> Interval:
    if rows < 1:
        raise EvalError("no rows to make an interval from", got=rows, allowed="1 or more")

    def finite(index: Indices) -> FloatArray:
        drawn = statistic(index)
        if not np.isfinite(drawn).all():
            raise EvalError(
                "the score of resampled rows is not finite",
                got=float(drawn[~np.isfinite(drawn)][0]),
                fix="Use more rows, or a score that is defined on any of them",
            )
        return drawn

    return bootstrap(rows, finite, samples, confidence, seed)


def _times_drawn(index: Indices) -> FloatArray:
    """How often each sample drew each row: [samples, rows] of indices to float64 [samples, rows]."""
    rows = index.shape[1]
    return np.stack([np.bincount(drawn, minlength=rows) for drawn in index]).astype(np.float64)


def _resampled(score: AdditiveScore, weights: FloatArray) -> FloatArray:
    return score.of_sums(np.asarray(weights @ score.counts))
