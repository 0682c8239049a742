"""What the singular values and vectors of a delta say: how many directions it uses, and which two adapters share."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares of their sum (Roy & Vetterli 2007, equation 2); 0 of nothing.

    From 1, one direction does all, to the number of values, where all are equal.
    """
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    return torch.special.entr(shares).sum().exp().item()


def energy_rank(values: Tensor, share: float = 0.9) -> int:
    """How many singular values [k], falling, hold `share` of the sum of squares; 0 of nothing."""
    squares = values.double().square()
    if squares.sum() <= 0:
        return 0
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """phi(i, j) = ‖Uᵢᵀ Vⱼ‖² / min(i, j): how much of the first i directions of one lies in the first j of the other.

    Hu et al. 2021, arXiv:2106.09685, equation 4. Two random subspaces come to max(i, j) / d.

    Args:
        one, other: orthonormal directions as columns, the strongest first, [d, k] and [d, m].

    Returns: [k, m], each from 0 (nothing in common) to 1 (the smaller lies in the larger).
    """
    squares = (one.T @ other).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, size + 1) for size in squares.shape)
    return squares / torch.minimum(rows[:, None], columns[None, :])


def directions(vectors: Tensor, values: Tensor) -> Tensor:
    """The columns of `vectors` whose singular value is more than rounding: the others point anywhere."""
    return vectors[:, values > 1e-6 * values.max().clamp_min(1e-30)]


def amplification(vectors: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> float:
    """‖Δ‖ / ‖Uᵀ W V‖: how much more the delta does in its own directions than the weight did (Hu et al. 2021, 7.3).

    Args:
        vectors: (U [out, k], S [k], Vᵀ [k, in]) of the delta.
        weight: [out, in].
    """
    u, s, vh = vectors
    return (s.norm() / (directions(u, s).T @ weight @ directions(vh.T, s)).norm().clamp_min(1e-30)).item()
