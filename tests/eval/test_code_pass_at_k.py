"""pass@k against its definition, and its intervals."""

from __future__ import annotations

from itertools import combinations

import pytest

from qlora_kit.errors import EvalError
from qlora_kit.eval.code.pass_at_k import pass_at_k, pass_at_k_interval


@pytest.mark.parametrize("passed", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_it_is_the_share_of_subsets_with_a_passing_program(passed: int, k: int) -> None:
    programs = [True] * passed + [False] * (6 - passed)
    subsets = list(combinations(programs, k))
    assert pass_at_k(6, passed, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets), abs=1e-15)


def test_pass_at_1_is_the_share_that_passed_and_large_numbers_stay_exact() -> None:
    assert pass_at_k(200, 30, 1) == pytest.approx(0.15, abs=1e-15)
    product = 1.0
    for i in range(200 - 30 + 1, 201):  # the same quantity as the paper's code computes it
        product *= 1 - 100 / i
    assert pass_at_k(200, 30, 100) == pytest.approx(1 - product, abs=1e-12)
    assert pass_at_k(200, 101, 100) == 1.0


def test_interval_over_problems() -> None:
    passed = [0, 10, 5, 0, 10, 2, 0, 1, 10, 7]
    one, five = pass_at_k_interval(passed, 10, 1), pass_at_k_interval(passed, 10, 5)
    assert one.value == pytest.approx(0.45) and five.value > one.value
    assert 0 <= one.low < one.value < one.high <= 1
    assert one == pass_at_k_interval(passed, 10, 1) and one != pass_at_k_interval(passed, 10, 1, seed=1)
    assert pass_at_k_interval([3, 3, 3], 3, 2).low == 1.0


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_be_among_the_samples(k: int) -> None:
    with pytest.raises(EvalError, match=rf"k of pass@k \(got {k}\)\. Allowed: 1 to 5"):
        pass_at_k(5, 1, k)


def test_more_passed_than_were_drawn() -> None:
    with pytest.raises(EvalError, match=r"programs that passed \(got 6\)\. Allowed: 0 to 5"):
        pass_at_k(5, 6, 1)
    with pytest.raises(EvalError, match="no rows to make an interval from"):
        pass_at_k_interval([], 5, 1)
