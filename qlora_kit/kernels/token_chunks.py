"""Losses of many tokens, a chunk of them at a time, so that logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
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
