"""Intervals against closed forms, scipy and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from qlora_kit.errors import EvalError
from qlora_kit.eval import intervals
from qlora_kit.eval.intervals import (
    Interval,
    bootstrap_difference_of_means,
    bootstrap_difference_of_ratios,
    bootstrap_mean,
    bootstrap_ratio,
    exponentiate,
    paired_t_interval,
    t_interval,
)


def test_mean_interval_is_close_to_the_normal_one() -> None:
    correct = np.random.default_rng(1).integers(0, 2, 2000)
    found = bootstrap_mean(correct, seed=3, resamples=4000)
    half_width = 1.96 * correct.std() / math.sqrt(2000)
    assert found.value == pytest.approx(correct.mean())
    assert found.high - found.value == pytest.approx(half_width, rel=0.1)
    assert found.value - found.low == pytest.approx(half_width, rel=0.1)


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)


def test_drawing_in_pieces_keeps_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr(intervals, "_MAX_DRAWN", 40 * 7)
    assert bootstrap_mean(values, resamples=500) == whole


def test_coverage_of_the_mean() -> None:
    random = np.random.default_rng(5)
    found = [bootstrap_mean(random.normal(1.0, 1.0, 60), resamples=400, seed=i) for i in range(200)]
    assert 0.88 <= np.mean([interval.low <= 1.0 <= interval.high for interval in found]) <= 0.99


def test_ratio_weighs_tokens_not_rows() -> None:
    assert bootstrap_ratio([10.0, 1.0], [10, 4]).value == pytest.approx(11 / 14)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    ratio = bootstrap_ratio([2.0, 9.0, 4.0, 1.0], [2, 5, 3, 4], seed=2)
    perplexity = exponentiate(ratio)
    for name in ("value", "low", "high"):
        assert getattr(perplexity, name) == pytest.approx(math.exp(getattr(ratio, name)))


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 30, 300)
    base = tokens * random.normal(3.0, 1.0, 300)
    tuned = base - 0.05 * tokens
    apart = bootstrap_ratio(base, tokens), bootstrap_ratio(tuned, tokens)
    assert apart[1].high > apart[0].low
    paired = bootstrap_difference_of_ratios((tuned, tokens), (base, tokens))
    assert paired.excludes_zero and paired.value == pytest.approx(-0.05)
    of_perplexity = bootstrap_difference_of_ratios((tuned, tokens), (base, tokens), transform=np.exp)
    expected = math.exp(tuned.sum() / tokens.sum()) - math.exp(base.sum() / tokens.sum())
    assert of_perplexity.value == pytest.approx(expected)


def test_difference_of_a_form_with_itself_is_zero() -> None:
    found = bootstrap_difference_of_means([0, 1, 1], [0, 1, 1])
    assert found == Interval(0.0, 0.0, 0.0) and not found.excludes_zero


def test_t_interval_is_scipys() -> None:
    values = [2.11, 2.05, 2.19]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    found = t_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_paired_t_interval_is_that_of_the_differences() -> None:
    assert paired_t_interval([1.0, 2.0, 3.5], [0.5, 1.0, 3.0]) == t_interval([0.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bootstrap_mean([]), "no rows"),
        (lambda: bootstrap_mean([[1.0]]), "no rows to make an interval from"),
        (lambda: bootstrap_mean([1.0, math.nan]), "row 1 is not finite"),
        (lambda: bootstrap_mean([1.0], confidence=95), "between 0 and 1"),
        (lambda: bootstrap_mean([1.0], resamples=0), "at least one resample"),
        (lambda: bootstrap_ratio([1.0, 2.0], [1]), r"different rows \(got \(2, 1\)\)"),
        (lambda: bootstrap_ratio([1.0, 2.0], [1, 0]), "row 1 must have tokens"),
        (lambda: exponentiate(bootstrap_ratio([800.0], [1])), "too large"),
        (lambda: bootstrap_difference_of_means([1, 0], [1]), "different rows"),
        (lambda: bootstrap_difference_of_ratios(([1.0], [1]), ([1.0, 2.0], [1, 1])), "different rows"),
        (lambda: t_interval([1.0]), "at least two seeds"),
        (lambda: paired_t_interval([1.0, 2.0], [1.0]), "different rows"),
    ],
)
def test_wrong_input_is_named(call, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvalError, match=match):
        call()
