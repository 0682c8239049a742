"""The LoRA layer y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3): a plain reference and a fused path.

The fused path expands the frozen weight once in each pass, adds the low-rank product into the output in place,
and keeps for the backward pass only x, which the layer's neighbours keep anyway, and x Aᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.kernels.frozen_linear import ExpandWeight, autocast_input, frozen_linear

WIDTH = 16
"""Products of so many ranks, and of multiples of it, sum each rank in the same order on a CPU; others may not."""


def even_ranks(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in `dtype`; in fp32 with ranks of zeros up to a multiple of WIDTH.

    So a rank that grows moves no bit of what it computed.
    """
    a, b, lacking = a.to(dtype), b.to(dtype), -len(a) % WIDTH
    if dtype != torch.float32 or not lacking:
        return a, b
    return F.pad(a, (0, 0, 0, lacking)), F.pad(b, (0, lacking))


def lora_linear_reference(
    x: Tensor, expand: ExpandWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """The plain path, and the one with dropout on the input of A. Shapes as in `lora_linear`."""
    x = autocast_input(x)
    h = F.linear(F.dropout(x, dropout), a.to(x.dtype))  # [..., rank]
    return frozen_linear(x, expand, bias) + scaling * F.linear(h, b.to(x.dtype))


def lora_linear(x: Tensor, expand: ExpandWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The fused path.

    Args:
        x: [..., in], float; products are made in its dtype.
        expand: gives the frozen W [out, in].
        bias: [out] or None; may be trainable.
        a: [rank, in], b: [out, rank], of any float dtype; their gradients come in their own dtype.
        scaling: alpha / rank, or alpha / sqrt(rank).

    Returns: [..., out] in x's dtype; under autocast in autocast's.
    """
    return _LoraLinear.apply(autocast_input(x), expand, bias, a, b, scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expand: ExpandWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        wide_a, wide_b = even_ranks(a, b, x.dtype)
        h = rows @ wide_a.T  # [tokens, rank and more]
        y = F.linear(rows, expand(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(h, wide_b.T, alpha=scaling)
        ctx.save_for_backward(rows, h[:, : len(a)].contiguous(), a, b)
        ctx.expand, ctx.scaling, ctx.shape = expand, scaling, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable  # h is saved without its history
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, a, b = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [tokens, out]
        grad_h = (g @ b.to(g.dtype)).mul_(ctx.scaling)  # [tokens, rank]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ ctx.expand(g.dtype)).addmm_(grad_h, a.to(g.dtype)).view(ctx.shape)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = g.sum(0).to(ctx.bias_dtype)
        grad_a = (grad_h.T @ rows).to(a.dtype)
        grad_b = (g.T @ h).mul_(ctx.scaling).to(b.dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None
