"""Second moments of what goes into the linear layers of a merged model, for profiles that round by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import output_head
from qlora_kit.adapters.input_moments import input_moments

FULL_BYTES = 2 << 30
"""Whole matrices of moments up to this size. Of larger models the diagonals say which layers get 8 bit, no more."""


def linear_moments(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Layer to its inputs' moments over `rows` of token ids, float32 [in, in], or [in] where the model is large.

    Without rows there are none: every weight then counts alike.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output_head(model)
    }
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (torch.tensor([list(row)], device=model.device) for row in rows)
    ]
    if not batches:
        return {}
    full = sum(4 * layer.in_features**2 for layer in layers.values()) <= FULL_BYTES
    return input_moments(model, list(layers), batches, full)
