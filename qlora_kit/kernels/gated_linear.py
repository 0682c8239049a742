"""The LoRA layer with a gate on each rank, y = x Wᵀ + b + s (g ⊙ (x Aᵀ)) Bᵀ: a plain reference and a fused path.

SoRA calls it a gate (Ding et al. 2023, equation 4), AdaLoRA a singular value (Zhang et al. 2023, equation 3).
The fused path is that of LoRA with the gates multiplied into A, whose gradient autograd hands on to both.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.frozen_linear import ExpandWeight, autocast_input, frozen_linear
from qlora_kit.kernels.lora_linear import lora_linear


def gated_linear_reference(
    x: Tensor,
    expand: ExpandWeight,
    bias: Tensor | None,
    a: Tensor,
    gates: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """The plain path, and the one with dropout on the input of A. Shapes as in `gated_linear`."""
    x = autocast_input(x)
    h = F.linear(F.dropout(x, dropout), a.to(x.dtype)) * gates.to(x.dtype)  # [..., rank]
    return frozen_linear(x, expand, bias) + scaling * F.linear(h, b.to(x.dtype))


def gated_linear(
    x: Tensor, expand: ExpandWeight, bias: Tensor | None, a: Tensor, gates: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The fused path.

    Args:
        x: [..., in], float; products are made in its dtype.
        expand: gives the frozen W [out, in].
        bias: [out] or None; may be trainable.
        a: [rank, in], b: [out, rank], of any float dtype.
        gates: [rank], float32.
        scaling: of the whole product.

    Returns: [..., out] in x's dtype; under autocast in autocast's.
    """
    return lora_linear(x, expand, bias, gates[:, None] * a, b, scaling)
