"""A perplexity ratio is an estimate: what few tokens leave open is not called past a limit, nor within it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_kit.export.perplexity import MIN_LOSS_TOKENS, TokenLosses, compare_perplexity

NOISE = np.random.default_rng(0).normal(0, 0.1, 4000)


def losses(differences: np.ndarray, completion: int, start: int = 0) -> TokenLosses:
    """Tokens on which the bundle loses so much more than the reference; the last `completion` carry loss."""
    count = len(differences)
    reference = np.full(count, 2.0)
    return TokenLosses(
        np.arange(start, start + count), reference + differences, reference, np.arange(count) >= count - completion
    )


def test_completions_alone_once_they_hold_enough_tokens() -> None:
    differences = np.r_[np.zeros(300), np.full(MIN_LOSS_TOKENS, 0.1)]
    enough = compare_perplexity([losses(differences, MIN_LOSS_TOKENS)])
    assert (enough.over, enough.tokens) == ("completions", MIN_LOSS_TOKENS) and enough.log == pytest.approx(0.1)
    fewer = compare_perplexity([losses(differences, MIN_LOSS_TOKENS - 1)])
    assert (fewer.over, fewer.tokens) == ("all tokens", 300 + MIN_LOSS_TOKENS)
    assert fewer.value == pytest.approx(fewer.bundle / fewer.reference)
    assert compare_perplexity([losses(differences, 1)], min_loss_tokens=1).tokens == 1


def test_three_tokens_leave_open_what_many_settle() -> None:
    few, many = (compare_perplexity([losses(0.027 + NOISE[:count], count)]) for count in (3, 4000))
    assert not few.is_past(1.005, exact=False) and not few.is_resolved(1.005)
    assert many.is_past(1.005, exact=False) and not many.is_resolved(1.005)
    assert many.is_resolved(1.05) and not many.is_past(1.05, exact=False)
    assert few.is_past(1.005, exact=True), "an exact bundle has no excuse"
    low, high = many.interval
    assert low < math.exp(0.027) < high < 1.04


def test_a_bundle_that_loses_less_is_as_far_away() -> None:
    assert compare_perplexity([losses(NOISE - 0.03, 9)]).is_past(1.005, exact=False)


def test_tokens_that_move_together_are_no_independent_witnesses() -> None:
    alone = compare_perplexity([losses(NOISE[:100], 0)]).error
    rows = [losses(np.full(20, shift), 0, start=20 * k) for k, shift in enumerate((0.1, -0.1, 0.1, -0.1, 0.1))]
    assert compare_perplexity(rows).error > 3 * alone, "rows"
    token = [losses(np.r_[NOISE[9 * k : 9 * k + 9], 0.5], 0, start=9 * k) for k in range(10)]
    for k, row in enumerate(token):
        row.targets[:] = [*range(9 * k, 9 * k + 9), 777]
    same = compare_perplexity(token).error
    for k, row in enumerate(token):
        row.targets[-1] = 1000 + k
    assert same > 1.5 * compare_perplexity(token).error, "the same token each time"


@pytest.mark.parametrize("count", [0, 1])
def test_one_token_settles_nothing(count: int) -> None:
    found = compare_perplexity([losses(np.zeros(count), count)])
    assert found.tokens == count and found.error == math.inf and not found.is_resolved(2.0)


@pytest.mark.parametrize("exact", [True, False])
def test_nan_is_past_every_limit(exact: bool) -> None:
    found = compare_perplexity([losses(np.array([0.0, math.nan, 0.0]), 1)])
    assert found.is_past(1e9, exact) and not found.is_resolved(1e9)
    assert math.isnan(found.value)
