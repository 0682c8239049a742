"""Several LoRA adapters become one: sums, exact or cut to a rank, TIES and DARE. All arithmetic is in fp32.

The rules bear PEFT's names and mean what PEFT's `add_weighted_adapter` means by them. With wᵢ the weight and
Δᵢ = sᵢ Bᵢ Aᵢ the delta of adapter i in one layer:

- `cat`: Σ wᵢ Δᵢ, exact; ranks add up.
- `svd`: the same sum, cut to the nearest matrix of a rank.
- `ties_svd`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune_svd`: a rule on the matrices Δᵢ, the result cut to
  a rank.
- `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: the rule on the factors, A with A and B with B, each
  weighted by √|wᵢ sᵢ|. This is cheap and keeps the rank, but (ΣBᵢ)(ΣAᵢ) holds products Bᵢ Aⱼ of adapters that have
  nothing to do with one another: it is not the sum of the deltas. `Combined.from_sum` says how far it is from it.

TIES: Yadav et al. 2023, arXiv:2306.01708, section 3. DARE: Yu et al. 2023, arXiv:2311.03099, section 3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_kit.adapters.deltas import Delta, concatenate, nearest
from qlora_kit.adapters.method import DTYPES
from qlora_kit.errors import AdapterError

MAX_RANK = 1024  # of adapter.rank
NEARLY_ZERO = 1e-5  # of the norms of what is added up: fp32 rounds at 6e-8, over many ranks


@dataclass(frozen=True)
class Rule:
    """What is combined, which values are left out of it before, and whether signs are elected (TIES).

    Attributes:
        on: `sum`, the deltas' factors side by side; `deltas`, whole matrices; `factors`, A with A and B with B.
        drop: leave out the `smallest` values (TIES, trim), `random` ones, the rest scaled up (DARE), or none.
        cut: whether the result is cut to a rank.
    """

    on: Literal["sum", "deltas", "factors"]
    drop: Literal["smallest", "random"] | None = None
    elect: bool = False
    cut: bool = False


RULES = {
    "cat": Rule("sum"),
    "svd": Rule("sum", cut=True),
    "ties_svd": Rule("deltas", "smallest", elect=True, cut=True),
    "dare_linear_svd": Rule("deltas", "random", cut=True),
    "dare_ties_svd": Rule("deltas", "random", elect=True, cut=True),
    "magnitude_prune_svd": Rule("deltas", "smallest", cut=True),
    "linear": Rule("factors"),
    "ties": Rule("factors", "smallest", elect=True),
    "dare_linear": Rule("factors", "random"),
    "dare_ties": Rule("factors", "random", elect=True),
    "magnitude_prune": Rule("factors", "smallest"),
}


@dataclass(frozen=True)
class Combination:
    """What is done, the same in every layer.

    Attributes:
        method: one of RULES.
        rank: of rules that cut; the largest rank of a layer's adapters where None. None exceeds what a layer can hold.
        density: share of values that is kept, of rules that drop some.
        seed: of what DARE drops; each layer draws for itself.
        dtype: `fp32` or `bf16`, which the factors are rounded to.
    """

    method: str
    rank: int | None = None
    density: float | None = None
    seed: int = 0
    dtype: str = "fp32"

    @property
    def rule(self) -> Rule:
        return RULES[self.method]


@dataclass(frozen=True)
class Combined:
    """One layer of the result.

    Attributes:
        delta: with scaling 1.
        lost: share of the combined delta's norm that the cut to a rank left out; None where that norm is rounding.
        from_sum: distance from the exact weighted sum, divided by the norm of that; rounding included. None where the
            weighted deltas cancel out, and that norm is rounding itself.
    """

    delta: Delta
    lost: float | None
    from_sum: float | None


def combine(
    adapters: Sequence[dict[str, Delta]], weights: Sequence[float], combination: Combination
) -> dict[str, Combined]:
    """The weighted combination of adapters of one base, layer by layer; a layer may be missing in some.

    Args:
        adapters: layer name to delta, for each adapter.
        weights: one for each adapter; a negative one subtracts.

    Raises:
        AdapterError: the arguments do not fit the rule or one another, or shapes or ranks of a layer differ.
    """
    _check(adapters, weights, combination)
    dtype, found = DTYPES[combination.dtype], {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        pairs = [(adapter[name], weight) for adapter, weight in zip(adapters, weights) if name in adapter]
        deltas, shares = [delta for delta, _ in pairs], [weight for _, weight in pairs]
        _check_layer(name, deltas, combination)
        delta, lost = _combine_layer(name, deltas, shares, combination)
        delta = Delta(delta.a.to(dtype).float(), delta.b.to(dtype).float())
        whole = concatenate(deltas, shares)
        if not math.isfinite(whole.norm() + delta.norm()):
            raise AdapterError(f"{name}: the combination overflows", got=list(weights), fix="Take smaller weights")
        nothing = NEARLY_ZERO * sum(abs(share) * part.norm() for part, share in pairs)
        distance = None if whole.norm() <= nothing else delta.minus(whole).norm() / whole.norm()
        found[name] = Combined(delta, None if delta.norm() <= nothing else lost, distance)
    return found


def _combine_layer(
    name: str, deltas: list[Delta], weights: list[float], combination: Combination
) -> tuple[Delta, float]:
    """The layer's delta, and the share of its norm that a cut left out."""
    rule, rank = combination.rule, combination.rank or max(delta.rank for delta in deltas)
    density = 1.0 if combination.density is None else combination.density
    generator = torch.Generator().manual_seed(_seed_of(combination.seed, name))
    if rule.on == "sum":
        whole = concatenate(deltas, weights)
        return whole.truncated(min(rank, whole.rank)) if rule.cut else (whole, 0.0)
    if rule.on == "deltas":
        matrix = merge_tensors([delta.dense() for delta in deltas], weights, rule, density, generator)
        return nearest(matrix, rank)
    roots = [math.sqrt(abs(weight * delta.scaling)) for delta, weight in zip(deltas, weights)]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights)]  # on one side, or signs would cancel
    a = merge_tensors([delta.a for delta in deltas], signed, rule, density, generator)
    return Delta(a, merge_tensors([delta.b for delta in deltas], roots, rule, density, generator)), 0.0


def merge_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, density: float, generator: torch.Generator
) -> Tensor:
    """Tensors of one shape become one: drop, elect signs and average, or drop and sum.

    Signs are elected among the tensors as a negative weight turns them, whatever its size: an adapter less itself is
    nothing. PEFT takes them as they are, which is the same where no weight is negative.
    """
    kept = [_drop(tensor, rule, density, generator) for tensor in tensors]
    weighted = torch.stack([weight * tensor for tensor, weight in zip(kept, weights, strict=True)])
    if not rule.elect:
        return weighted.sum(0)
    turned = torch.stack([math.copysign(1.0, weight) * tensor for tensor, weight in zip(kept, weights)])
    elected = turned.sum(0).sign()  # γ of the paper; a tie elects nobody
    agree = (turned.sign() == elected) & (elected != 0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _drop(tensor: Tensor, rule: Rule, density: float, generator: torch.Generator) -> Tensor:
    if rule.drop is None or density == 1:
        return tensor
    if rule.drop == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density
    flat, kept = tensor.flatten(), torch.zeros(tensor.numel())
    places = flat.abs().topk(int(density * tensor.numel())).indices
    kept[places] = flat[places]
    return kept.view_as(tensor)


def _seed_of(seed: int, layer: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {layer}".encode()).digest()[:7], "big")


def _check(adapters: Sequence[dict[str, Delta]], weights: Sequence[float], combination: Combination) -> None:
    rule, method = combination.rule, combination.method
    rank, density = combination.rank, combination.density
    if len(weights) != len(adapters):
        raise AdapterError("number of weights", got=len(weights), allowed=f"{len(adapters)}, one for each adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError("weights", got=list(weights), allowed="finite numbers")
    if rank is not None and not rule.cut:
        raise AdapterError(f"{method} takes no rank: what comes out has the rank that it has", fix="Use svd to cut it")
    if rule.drop and density is None:
        raise AdapterError(f"{method} needs a density, the share of values that it keeps", fix="Give one, such as 0.5")
    if density is not None and not rule.drop:
        raise AdapterError(f"{method} keeps all values: it takes no density", fix="Leave it out")
    if density is not None and not 0 < density <= 1:
        raise AdapterError("density", got=density, allowed="more than 0, at most 1")
    most = max(_most(name, adapters, rule) for adapter in adapters for name in adapter)
    if rank is not None and not 1 <= rank <= min(most, MAX_RANK):
        raise AdapterError("rank", got=rank, allowed=f"1 to {min(most, MAX_RANK)}, which no layer's result exceeds")
    if not rule.cut and most > MAX_RANK:
        raise AdapterError(f"rank of the result of {method}", got=most, allowed=f"up to {MAX_RANK}", fix="Use svd")


def _most(name: str, adapters: Sequence[dict[str, Delta]], rule: Rule) -> int:
    """The largest rank that the result can have in a layer."""
    deltas = [adapter[name] for adapter in adapters if name in adapter]
    if rule.on == "factors":
        return deltas[0].rank
    whole = min(deltas[0].shape)
    ranks = sum(delta.rank for delta in deltas)
    return whole if rule.on == "deltas" else min(ranks, whole) if rule.cut else ranks


def _check_layer(name: str, deltas: list[Delta], combination: Combination) -> None:
    shapes = [delta.shape for delta in deltas]
    if len(set(shapes)) > 1:
        raise AdapterError(
            f"{name}: the adapters are for weights of different shapes", got=shapes, fix="Take adapters of one base"
        )
    ranks = [delta.rank for delta in deltas]
    if combination.rule.on == "factors" and len(set(ranks)) > 1:
        raise AdapterError(
            f"{name}: {combination.method} needs adapters of one rank",
            got=ranks,
            fix="Use svd, or another rule that ends in svd",
        )
