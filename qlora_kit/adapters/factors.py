"""The nearest low-rank product to a matrix, and what it leaves of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.adapters.input_moments import Weighing
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.svd_settings import SvdSettings

OVERSAMPLING = 8  # more columns than are kept: Halko et al. 2011, section 4.2, advise 5 to 10


class Factors(NamedTuple):
    """A low-rank product B A, in the adapter's dtype."""

    a: Tensor
    b: Tensor


def best_factors(matrix: Tensor, settings: SvdSettings, weighing: Weighing | None = None) -> Factors:
    """The factors whose product, times the scaling, is nearest to `matrix` float32 [out, in] at the settings' rank.

    A = sqrt(S/s) Vᵀ and B = U sqrt(S/s) (PiSSA, equations 2 and 3), rounded to the adapter's dtype. With
    settings.niter, S and its vectors come from subspace iteration (Halko et al. 2011, algorithm 4.4).

    With `weighing`, nearest is in ‖(M - s B A) R^½‖: U S Vᵀ is M R^½'s, and Vᵀ R^-½ takes Vᵀ's place (QERA, theorem 1).
    """
    rank = settings.rank
    if weighing is not None:
        matrix = weighing.apply(matrix)
    if settings.niter:
        columns = min(rank + OVERSAMPLING, *matrix.shape)
        u, s, v = torch.svd_lowrank(matrix, columns, settings.niter)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root, dtype = (s[:rank] / settings.scaling).sqrt(), DTYPES[settings.dtype]
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    if weighing is not None:
        a = weighing.undo(a)
        balance = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-30)).sqrt()  # as without it: both are of one length
        a, b = a * balance[:, None], b / balance.clamp_min(1e-30)
    return Factors(a.to(dtype).contiguous(), b.to(dtype).contiguous())


def residual(weight: Tensor, product: Factors, scaling: float) -> Tensor:
    """W - scaling · B A, float32 [out, in]. Summed in float64, so that no order of summation shows in the codes."""
    delta = product.b.double() @ product.a.double()
    return delta.mul_(-scaling).add_(weight).float()
