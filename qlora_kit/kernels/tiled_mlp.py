"""A layer's MLP over a long sequence, some tokens at a time: its wide inner activations never exist for all of them.

An MLP treats each token by itself, so that tiles give what the whole gives (sequence tiling as in Arctic Long Sequence
Training: Bekman et al. 2025, arXiv 2506.13996). A tile is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MLP_NAMES = ("mlp", "feed_forward")  # what transformers' decoders call it


def tiled(mlp: Callable[[Tensor], Tensor], tiles: int, x: Tensor) -> Tensor:
    """mlp(x), which is the plain path, from `tiles` parts of the sequence.

    Args:
        mlp: [batch, n, width] to [batch, n, out], token by token; may be trained.
        tiles: parts of about equal length; fewer where there are fewer tokens.
        x: [batch, seq, width].

    Returns: [batch, seq, out].
    """
    parts: list[Tensor] = [checkpoint(mlp, part.contiguous(), use_reentrant=False) for part in x.chunk(tiles, dim=1)]
    return torch.cat(parts, dim=1)


def tile_mlps(model: nn.Module, tiles: int) -> int:
    """Lets every MLP of a decoder's layers work in tiles, in place. Returns how many there are.

    Mixtures of experts are left alone: they sort tokens among experts, and none of these sees all of them.
    """
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in MLP_NAMES and not hasattr(module, "experts")
    ]
    for module in found:
        module.forward = partial(tiled, module.forward, tiles)  # type: ignore[method-assign]
    return len(found)
