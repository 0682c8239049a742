"""A linear layer whose weight is frozen and expanded when needed: nothing of its size is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ExpandWeight = Callable[[torch.dtype], Tensor]
"""Returns the frozen weight [out, in] in the dtype asked for."""


def frozen_linear_reference(x: Tensor, expand: ExpandWeight, bias: Tensor | None) -> Tensor:
    """The plain path: autograd keeps the expanded weight until the backward pass. x [..., in] -> [..., out]."""
    return F.linear(x, expand(x.dtype), None if bias is None else bias.to(x.dtype))


def frozen_linear(x: Tensor, expand: ExpandWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b for a frozen W, expanded once in each pass.

    Args:
        x: [..., in], any float dtype; the product is made in it.
        expand: gives W [out, in].
        bias: [out] or None; may be trainable.

    Returns: [..., out] in x's dtype; under autocast in autocast's, as torch's own linear layer.
    """
    return _FrozenLinear.apply(autocast_input(x), expand, bias)


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, computes linear layers in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: ExpandWeight, bias: Tensor | None) -> Tensor:
        ctx.expand = expand
        ctx.bias_dtype = None if bias is None else bias.dtype
        return frozen_linear_reference(x, expand, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad_y,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.expand(grad_y.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias
