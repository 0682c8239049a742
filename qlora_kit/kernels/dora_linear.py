"""The DoRA layer y = m/‖W + s B A‖ ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b: a plain reference and a fused path.

The norm is one for each row of W + s B A, and is taken as a constant in the backward pass (Liu et al. 2024,
arXiv:2402.09353, section 4.3). The fused path never makes W + s B A, nor an fp32 copy of W: with the squares of W's
rows known, ‖w + s bA‖² = ‖w‖² + 2 s (wAᵀ)·b + s² b(AAᵀ)·b.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.kernels.frozen_linear import ExpandWeight, autocast_input
from qlora_kit.kernels.lora_linear import even_ranks

SMALLEST_NORM = 2.0**-60  # of a row that is all zero, as of a padding token


def dora_linear_reference(
    x: Tensor,
    expand: ExpandWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """The plain path, and the one with dropout on the input of A. Shapes as in `dora_linear`."""
    x = autocast_input(x)
    weight = expand(x.dtype)
    whole = weight.float() + scaling * (b.detach().float() @ a.detach().float())
    factor = (magnitude / whole.norm(dim=1).clamp_min(SMALLEST_NORM)).to(x.dtype)  # [out]
    low = F.linear(F.linear(F.dropout(x, dropout), a.to(x.dtype)), b.to(x.dtype))
    y = factor * (F.linear(x, weight) + scaling * low)
    return y if bias is None else y + bias.to(x.dtype)


def dora_linear(
    x: Tensor,
    expand: ExpandWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    row_squares: Tensor,
    scaling: float,
) -> Tensor:
    """The fused path.

    Args:
        x: [..., in], float; products are made in its dtype.
        expand: gives the frozen W [out, in].
        bias: [out] or None; may be trainable.
        a: [rank, in], b: [out, rank], magnitude: [out], of any float dtype; gradients come in their own dtype.
        row_squares: float32 [out], the squared norm of each row of W.
        scaling: alpha / rank, or alpha / sqrt(rank).

    Returns: [..., out] in x's dtype; under autocast in autocast's.
    """
    return _DoraLinear.apply(autocast_input(x), expand, bias, a, b, magnitude, row_squares, scaling)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, row_squares: Tensor, scaling: float) -> Tensor:
    """‖w + s bA‖ of each row, float32 [out]; products with W [out, in] are made in its dtype."""
    across = (weight @ a.to(weight.dtype).T).float()  # [out, rank]
    a32, b32 = a.float(), b.float()
    squares = row_squares + (b32 * (2 * scaling * across + scaling**2 * (b32 @ (a32 @ a32.T)))).sum(1)
    return squares.clamp_min_(SMALLEST_NORM**2).sqrt_()


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: ExpandWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        row_squares: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        weight = expand(x.dtype)
        norms = row_norms(weight, a, b, row_squares, scaling)
        factor = (magnitude / norms).to(x.dtype)  # [out]
        wide_a, wide_b = even_ranks(a, b, x.dtype)
        h = rows @ wide_a.T  # [tokens, rank and more]
        z = torch.mm(rows, weight.T).addmm_(h, wide_b.T, alpha=scaling)  # [tokens, out]
        y = z * factor
        if bias is not None:
            y += bias.to(x.dtype)
        ctx.save_for_backward(rows, h[:, : len(a)].contiguous(), a, b, z, factor, norms)
        ctx.expand, ctx.scaling, ctx.shape, ctx.magnitude_dtype = expand, scaling, x.shape, magnitude.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, a, b, z, factor, norms = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [tokens, out]
        grad_magnitude = ((g * z).sum(0, dtype=torch.float32) / norms).to(ctx.magnitude_dtype)
        grad_bias = grad_x = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = g.sum(0).to(ctx.bias_dtype)
        g = g * factor
        grad_h = (g @ b.to(g.dtype)).mul_(ctx.scaling)  # [tokens, rank]
        if ctx.needs_input_grad[0]:
            grad_x = (g @ ctx.expand(g.dtype)).addmm_(grad_h, a.to(g.dtype)).view(ctx.shape)
        grad_a = (grad_h.T @ rows).to(a.dtype)
        grad_b = (g.T @ h).mul_(ctx.scaling).to(b.dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, grad_magnitude, None, None
