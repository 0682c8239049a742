"""Optimizer states of a weight that takes another shape: what old and new share is kept.

New first moments start at zero, new second moments at the mean over the old ranks: the step count goes on, so that
nothing corrects a second moment that starts at zero, and its weights would move too far for hundreds of steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BNB_BLOCK = 256  # values of a bitsandbytes 8-bit state that share a scale
SECOND_MOMENTS = ("exp_avg_sq", "state2")  # torch's name, bitsandbytes'


def resized(values: Tensor, shape: torch.Size, fill: Tensor | float = 0.0) -> Tensor:
    """`values` cut, or filled up with `fill` (of a shape that broadcasts to `shape`), at the end of each dimension."""
    whole = values.new_empty(shape)
    whole[...] = fill
    shared = tuple(slice(min(sizes)) for sizes in zip(values.shape, shape, strict=True))
    whole[shared] = values[shared]
    return whole


def resized_states(state: dict[str, Any], old: torch.Size, shape: torch.Size) -> dict[str, Any]:
    """The entries of one weight's optimizer state for its new shape; step counts and code tables stay.

    bitsandbytes' 8-bit states (Dettmers et al. 2022) are expanded, resized and quantized again: their blocks run
    through the whole tensor, so that each holds other values than before.
    """
    from qlora_kit.model.quantized import bnb

    found = dict(state)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != old:
            continue
        if value.dtype == torch.uint8:
            number = name.removeprefix("state")
            scales, table = f"absmax{number}", state[f"qmap{number}"]
            values = bnb.functional.dequantize_blockwise(value, absmax=state[scales], code=table, blocksize=BNB_BLOCK)
            found[name], quantized = bnb.functional.quantize_blockwise(
                _moment(name, values, shape), code=table, blocksize=BNB_BLOCK
            )
            found[scales] = quantized.absmax
        else:
            found[name] = _moment(name, value, shape)
    return found


def _moment(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """A second moment's new part begins at the mean over the old ranks, input by input and output by output.

    Gradients of these differ by orders of magnitude: one mean of all would leave most of the new part at rest.
    """
    if name not in SECOND_MOMENTS:
        return resized(values, shape)
    grown = [dim for dim, (old, new) in enumerate(zip(values.shape, shape, strict=True)) if new > old]
    fill = values.double().mean(grown, keepdim=True).to(values.dtype) if grown else 0.0
    return resized(values, shape, fill)
