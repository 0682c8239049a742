"""Intervals for what an evaluation reports: bootstrap over rows, Student's t over seeds.

Rows are the unit of resampling: the tokens of one row are not independent of each other, so a token-weighted
statistic (loss, perplexity) is resampled by whole rows.

Sources:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
    Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004 (paired bootstrap: both
    systems are scored on the same resampled rows).
    Student, The Probable Error of a Mean, Biometrika 1908.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlora_kit.errors import EvalError

FloatArray = NDArray[np.float64]
_MAX_DRAWN = 4_000_000  # indices held at once: 32 MB, whatever the number of rows
FEWEST_ROWS = 3
"""Rows from which on a bootstrap interval says anything: one row resampled is itself, two give three values."""


@dataclass(frozen=True)
class Interval:
    """A statistic and the ends of its interval, in the statistic's own unit."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True where the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(
    values: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0, name: str = "values"
) -> Interval:
    """Percentile interval of a mean over rows, for example of accuracy from 0/1 per row.

    Args:
        values: [rows], finite.
        resamples: bootstrap samples drawn.
        confidence: coverage, between 0 and 1.
        seed: same seed, same interval.
        name: what the values are, for error messages.

    Raises:
        EvalError: no rows, a value that is not finite, or an impossible `confidence` or `resamples`.
    """
    rows = _checked(values, name)
    return bootstrap(len(rows), lambda index: rows[index].mean(axis=-1), resamples, confidence, seed)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    name: str = "loss",
) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), for example of loss a token.

    Args:
        numerators: [rows], summed loss of each row in nats.
        denominators: [rows], the row's loss tokens; each above zero, so that no resample divides by zero.
        resamples, confidence, seed, name: as in `bootstrap_mean`.

    Raises:
        EvalError: as `bootstrap_mean`; also lengths that differ, or a denominator that is not above zero.
    """
    top, bottom = _checked_pair(numerators, denominators, f"{name} and its tokens")
    _check_positive(bottom, name)
    return bootstrap(
        len(top), lambda index: top[index].sum(axis=-1) / bottom[index].sum(axis=-1), resamples, confidence, seed
    )


def exponentiate(loss: Interval) -> Interval:
    """A loss in nats a token as perplexity: percentile intervals respect monotone transformations.

    Raises:
        EvalError: a loss too large for exp (over 709 nats a token).
    """
    try:
        return Interval(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high))
    except OverflowError:
        raise EvalError("loss too large for a perplexity", got=loss.value, allowed="up to 709 nats") from None


def bootstrap_difference_of_means(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0, name: str = "values"
) -> Interval:
    """Interval of mean(a) - mean(b), both scored on the same rows.

    Args:
        a, b: [rows], row i of both being the same row of data.
        resamples, confidence, seed, name: as in `bootstrap_mean`.

    Raises:
        EvalError: as `bootstrap_mean`; also lengths that differ.
    """
    left, right = _checked_pair(a, b, name)
    return bootstrap_mean(left - right, resamples=resamples, confidence=confidence, seed=seed, name=name)


def bootstrap_difference_of_ratios(
    a: tuple[ArrayLike, ArrayLike],
    b: tuple[ArrayLike, ArrayLike],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    transform: Callable[[FloatArray], FloatArray] = np.asarray,
    name: str = "loss",
) -> Interval:
    """Interval of f(sum a0 / sum a1) - f(sum b0 / sum b1), both scored on the same resampled rows.

    Args:
        a, b: (numerators, denominators), each [rows].
        transform: f, applied to the ratios; `numpy.exp` gives a difference of perplexities.
        resamples, confidence, seed, name: as in `bootstrap_ratio`.

    Raises:
        EvalError: as `bootstrap_ratio`.
    """
    a_top, a_bottom = _checked_pair(*a, f"{name} and its tokens")
    b_top, b_bottom = _checked_pair(*b, f"{name} and its tokens")
    _checked_pair(a_top, b_top, name)
    _check_positive(a_bottom, name)
    _check_positive(b_bottom, name)

    def difference(index: NDArray[np.int64]) -> FloatArray:
        a_ratio = a_top[index].sum(axis=-1) / a_bottom[index].sum(axis=-1)
        b_ratio = b_top[index].sum(axis=-1) / b_bottom[index].sum(axis=-1)
        return np.asarray(transform(a_ratio) - transform(b_ratio))

    return bootstrap(len(a_top), difference, resamples, confidence, seed)


def t_interval(values: ArrayLike, *, confidence: float = 0.95, name: str = "values") -> Interval:
    """Mean ± Student's t interval, for the handful of seeds a benchmark is run with.

    Args:
        values: [seeds], at least two, finite.
        confidence: coverage, between 0 and 1.
        name: what the values are, for error messages.

    Raises:
        EvalError: fewer than two values, a value that is not finite, or an impossible `confidence`.
    """
    from scipy.special import stdtrit

    seeds = _checked(values, name)
    _check_confidence(confidence)
    if len(seeds) < 2:
        raise EvalError(f"{name}: a t interval needs at least two seeds", got=len(seeds), fix="Run more seeds")
    quantile = float(stdtrit(len(seeds) - 1, 0.5 + confidence / 2))
    mean = float(seeds.mean())
    half_width = quantile * float(seeds.std(ddof=1)) / math.sqrt(len(seeds))
    return Interval(mean, mean - half_width, mean + half_width)


def paired_t_interval(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, name: str = "values") -> Interval:
    """Mean of a - b ± Student's t interval; a[i] and b[i] share a seed, so that what a seed shifts in both cancels.

    Args:
        a, b: [seeds], at least two.
        confidence, name: as in `t_interval`.

    Raises:
        EvalError: as `t_interval`; also lengths that differ.
    """
    left, right = _checked_pair(a, b, name)
    return t_interval(left - right, confidence=confidence, name=name)


def bootstrap(
    rows: int, statistic: Callable[[NDArray[np.int64]], FloatArray], resamples: int, confidence: float, seed: int
) -> Interval:
    """`statistic` maps row indices [resamples, rows] to [resamples]."""
    _check_confidence(confidence)
    if resamples < 1:
        raise EvalError("a bootstrap needs at least one resample", got=resamples, allowed="1 or more")
    random = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWN // rows)
    drawn = [
        statistic(random.integers(0, rows, size=(min(at_once, resamples - start), rows)))
        for start in range(0, resamples, at_once)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    value = statistic(np.arange(rows)[np.newaxis, :])[0]
    return Interval(float(value), float(low), float(high))


def _checked(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise EvalError(f"{name}: no rows to make an interval from", got=array.shape, allowed="one number a row")
    bad: Sequence[int] = np.flatnonzero(~np.isfinite(array)).tolist()
    if bad:
        raise EvalError(f"{name}: row {bad[0]} is not finite", got=float(array[bad[0]]))
    return array


def _checked_pair(a: ArrayLike, b: ArrayLike, name: str) -> tuple[FloatArray, FloatArray]:
    left, right = _checked(a, name), _checked(b, name)
    if len(left) != len(right):
        raise EvalError(f"{name}: the two sides have different rows", got=(len(left), len(right)))
    return left, right


def _check_positive(denominators: FloatArray, name: str) -> None:
    bad = np.flatnonzero(denominators <= 0)
    if bad.size:
        raise EvalError(f"{name}: row {bad[0]} must have tokens", got=float(denominators[bad[0]]))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise EvalError("confidence is not between 0 and 1", got=confidence, allowed="for example 0.95")
