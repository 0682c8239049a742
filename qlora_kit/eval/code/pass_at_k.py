"""pass@k: the chance that at least one of k programs drawn for a problem passes its tests."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from qlora_kit.errors import EvalError
from qlora_kit.eval.intervals import Interval, bootstrap_mean


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate from `samples` programs of one problem, `passed` of which passed: 0..1.

    Source: Chen et al., Evaluating Large Language Models Trained on Code, 2021, equation 1: 1 - C(n-c, k) / C(n, k).
    In whole numbers, so that no product of small factors is needed.

    Raises:
        EvalError: k is not between 1 and `samples`, or `passed` not between 0 and `samples`.
    """
    if not 1 <= k <= samples:
        raise EvalError("k of pass@k", got=k, allowed=f"1 to {samples}, the programs drawn for each problem")
    if not 0 <= passed <= samples:
        raise EvalError("programs that passed", got=passed, allowed=f"0 to {samples}")
    return 1 - comb(samples - passed, k) / comb(samples, k)


def pass_at_k_interval(passed: Sequence[int], samples: int, k: int, *, seed: int = 0) -> Interval:
    """The mean of pass@k over problems, with its 95% bootstrap interval over problems.

    Args:
        passed: [problems], of `samples` programs each, those that passed.

    Raises:
        EvalError: as `pass_at_k`; also without problems.
    """
    return bootstrap_mean([pass_at_k(samples, count, k) for count in passed], seed=seed, name=f"pass@{k}")
