"""Losses of many tokens, a chunk of them at a time, so that logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24  # numbers in a chunk's logits: 64 MiB in fp32


def token_chunks(tokens: int, vocab: int, chunk_logits: int = CHUNK_LOGITS) -> list[slice]:
    """Consecutive slices of the tokens, the logits [n, vocab] of each at most `chunk_logits` numbers (or one row)."""
    size = max(1, chunk_logits // vocab)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def chunked_losses(
    hidden: Tensor, losses: Callable[[Tensor, slice], Tensor], vocab: int, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """What `losses` gives of each chunk [n, width] of hidden [tokens, width] and its place, in one tensor [tokens].

    Nothing of a chunk is kept: it is computed again in the backward pass.
    """
    parts: list[Tensor] = [
        checkpoint(losses, hidden[place], place, use_reentrant=False)
        for place in token_chunks(len(hidden), vocab, chunk_logits)
    ]
    return torch.cat(parts) if parts else hidden.float().sum(1)


def losses_with_gradients(hidden: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], None]) -> Tensor:
    """Losses float32 [tokens] of hidden [tokens, width] whose gradients are made with them, while logits are there.

    The backward pass only multiplies; gradients are kept for each token, so that losses may be weighted afterwards.

    Args:
        compute: is given hidden, and writes the losses [tokens] and, where one is given, the gradient [tokens, width]
            of each.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    found: Tensor = _LossesWithGradients.apply(hidden, compute, wanted)
    return found


class _LossesWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, compute: Callable[[Tensor, Tensor, Tensor | None], None], wanted: bool
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if wanted else None  # of each token's own loss
        compute(hidden, losses, grads)
        if grads is not None:
            ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad_hidden = (kept * grads[0][:, None]).to(kept.dtype)  # multiplied in fp32, rounded once
        return grad_hidden, None, None
