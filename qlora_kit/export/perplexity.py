"""The perplexity of a bundle against the reference's, with how sure the tokens at hand make it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

MIN_LOSS_TOKENS = 200
"""Completions with fewer are too little by themselves: prompts are then compared too."""
DOUBT = 2.0
"""Standard errors on either side of a mean that count as doubt: about 95%."""

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenLosses:
    """Losses, in nats, of the predicted tokens of one row.

    Attributes:
        targets: int [n], the tokens themselves.
        bundle, reference: float64 [n].
        in_completion: bool [n], which of them carry loss in training.
    """

    targets: npt.NDArray[np.int_]
    bundle: DoubleArray
    reference: DoubleArray
    in_completion: npt.NDArray[np.bool_]

    def completion(self) -> TokenLosses:
        """Those of the completion alone."""
        chosen = self.in_completion
        return TokenLosses(self.targets[chosen], self.bundle[chosen], self.reference[chosen], chosen[chosen])


@dataclass(frozen=True)
class PerplexityRatio:
    """Bundle's perplexity over the reference's: exp of the mean difference of their losses.

    Attributes:
        bundle, reference: the two perplexities.
        log: mean difference in nats a token.
        error: its standard error; infinite where there are too few tokens to tell.
    """

    over: Literal["completions", "all tokens"]
    tokens: int
    bundle: float
    reference: float
    log: float
    error: float

    @property
    def value(self) -> float:
        """The ratio itself."""
        return _exp(self.log)

    @property
    def interval(self) -> tuple[float, float]:
        """The ratio's bounds, two standard errors either way."""
        return _exp(self.log - DOUBT * self.error), _exp(self.log + DOUBT * self.error)

    def is_past(self, limit: float, exact: bool) -> bool:
        """True where the ratio, or its inverse, is above `limit`; unless `exact`, beyond doubt. NaN is."""
        return not abs(self.log) - (0.0 if exact else DOUBT * self.error) <= math.log(limit)

    def is_resolved(self, limit: float) -> bool:
        """True where the ratio and its inverse are within `limit` beyond doubt."""
        return abs(self.log) + DOUBT * self.error <= math.log(limit)


def compare_perplexity(rows: list[TokenLosses], min_loss_tokens: int = MIN_LOSS_TOKENS) -> PerplexityRatio:
    """Over the completions, if they hold `min_loss_tokens`; else over all predicted tokens."""
    completions = [row.completion() for row in rows]
    enough = sum(len(row.bundle) for row in completions) >= min_loss_tokens
    chosen = [row for row in (completions if enough else rows) if len(row.bundle)]
    if not chosen:
        return PerplexityRatio("all tokens", 0, math.nan, math.nan, math.nan, math.inf)
    bundle = np.concatenate([row.bundle for row in chosen])
    reference = np.concatenate([row.reference for row in chosen])
    lengths = [len(row.bundle) for row in chosen]
    return PerplexityRatio(
        over="completions" if enough else "all tokens",
        tokens=len(bundle),
        bundle=_exp(float(bundle.mean())),
        reference=_exp(float(reference.mean())),
        log=float((bundle - reference).mean()),
        error=_standard_error(
            bundle - reference,
            [np.repeat(np.arange(len(chosen)), lengths), np.concatenate([row.targets for row in chosen])],
        ),
    )


def _standard_error(values: DoubleArray, groupings: list[npt.NDArray[np.int_]]) -> float:
    """Of the mean of `values` [n]: the largest of what single values say and what each grouping says.

    Rounding moves the tokens of a row together, and a token that ends every answer the same way each time: such values
    are no independent witnesses. The cluster-robust form (Cameron and Miller 2015, section II) adds them up by group
    first; as it is rough for few groups, it never lowers the error.

    Args:
        groupings: each int [n], equal numbers for values of one group.
    """
    if len(values) < 2:
        return math.inf
    errors = [float(values.std(ddof=1)) / math.sqrt(len(values))]
    for groups in groupings:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=values - values.mean())
        if len(sums) > 1:
            errors.append(math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / len(values))
    return max(errors)


def _exp(log: float) -> float:
    """exp, infinite where it is too large for a float."""
    return math.exp(log) if log < 700 else (math.inf if log == log else math.nan)
