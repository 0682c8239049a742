"""Optimizer states of a weight that takes another shape: what old and new share is kept, the rest starts at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BNB_BLOCK = 256  # values of a bitsandbytes 8-bit state that share a scale


def resized(values: Tensor, shape: torch.Size) -> Tensor:
    """`values` cut, or filled up with zeros, at the end of each dimension."""
    whole = values.new_zeros(shape)
    shared = tuple(slice(min(sizes)) for sizes in zip(values.shape, shape, strict=True))
    whole[shared] = values[shared]
    return whole


def resized_states(state: dict[str, Any], old: torch.Size, shape: torch.Size) -> dict[str, Any]:
    """The entries of one weight's optimizer state for its new shape; step counts and code tables stay.

    bitsandbytes' 8-bit states (Dettmers et al. 2022) are expanded, resized and quantized again: their blocks run
    through the whole tensor, so that each holds other values than before.
    """
    found = dict(state)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old:
            continue
        if value.dtype == torch.uint8:
            number = name.removeprefix("state")
            found[name], found[f"absmax{number}"] = _requantized(
                value, state[f"absmax{number}"], state[f"qmap{number}"], shape
            )
        else:
            found[name] = resized(value, shape)
    return found


def _requantized(codes: Tensor, absmax: Tensor, table: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(uint8 codes, float32 absmax of each block) for the new shape."""
    from qlora_kit.model.quantized import bnb

    values = bnb.functional.dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=BNB_BLOCK)
    new, scales = bnb.functional.quantize_blockwise(resized(values, shape), code=table, blocksize=BNB_BLOCK)
    return new, scales.absmax
