"""Second moments of what goes into the linear layers of a merged model, for profiles that round by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import output_head
from qlora_kit.adapters.input_moments import input_moments
from qlora_kit.adapters.layer import LINEAR, AdaptedLinear, linear_shape

FULL_BYTES = 2 << 30
"""Whole matrices of moments up to this size. Of larger models the diagonals say which layers get 8 bit, no more."""


def linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers of a merged model by name, or those that they are before it is merged."""
    kinds = (*LINEAR, AdaptedLinear)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.endswith(".base_layer")
    }


def linear_moments(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Layer to its inputs' moments over `rows` of token ids, float32 [in, in], or [in] where the model is large.

    Without rows there are none: every weight then counts alike.
    """
    head = output_head(model)
    layers = {name: layer for name, layer in linear_layers(model).items() if layer is not head}
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (torch.tensor([list(row)], device=model.device) for row in rows)
    ]
    if not batches:
        return {}
    widths = [linear_shape(layer)[0] for layer in layers.values()]
    full = sum(4 * width**2 for width in widths) <= FULL_BYTES
    return input_moments(model, list(layers), batches, full)
