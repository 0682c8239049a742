"""What a delta is added onto: the base that it was trained against, or other grounds that people merge onto."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.methods import METHODS
from qlora_kit.errors import ExportError
from qlora_kit.export.merge import Hold, LayerDelta, in_memory, merge_adapter
from qlora_kit.model.quantize import Quantization
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import coded_head
from qlora_kit.recipe import Onto
from qlora_kit.train.adapted_model import int4_grid
from qlora_kit.train.restore import load_run_base
from qlora_kit.train.run_folder import RunFolder


@torch.no_grad()
def merge_onto(
    run: RunFolder, model: PreTrainedModel, onto: Onto = "dequantized", hold: Hold = in_memory
) -> list[LayerDelta]:
    """Turns the tuned model of a run into a plain one in fp32, in place.

    `dequantized` is the model that was trained. `original` puts the base's own 16-bit weights in the place of the
    dequantized ones, under the same deltas. `requantized` rounds each merged weight to the base's codes once more.

    Raises:
        ExportError: the base is not quantized, or the adapter was made for what is left of it; as `merge_adapter`.
    """
    _refuse(run, onto)
    if onto == "dequantized":
        return merge_adapter(model, hold)
    base = run.recipe().base
    original = load_run_base(run, "none") if onto == "original" else None
    head = coded_head(model)
    codes = Quantization(base.quant, base.double_quant, grid=int4_grid(base))

    def adjusted(name: str, layer: QuantizedLinear, weight: torch.Tensor) -> torch.Tensor:
        if original is None and layer is head:
            return weight  # no delta was added to it: it is rounded already
        if original is None:
            return codes.quantize(weight.contiguous(), None).dequantize(torch.float32)
        whole: Any = original.get_submodule(name)
        return weight + _rows(whole) - layer.dequantize(torch.float32)

    return merge_adapter(model, hold, adjusted)


def _refuse(run: RunFolder, onto: Onto) -> None:
    recipe = run.recipe()
    if onto == "dequantized":
        return
    if recipe.base.quant == "none":
        raise ExportError(f"export.onto {onto} needs a quantized base", got="none", allowed="dequantized")
    if onto == "original" and METHODS[recipe.adapter.method].replaces_base:
        raise ExportError(
            f"adapter.method {recipe.adapter.method} was trained on what it left of the base, not on the original",
            allowed="dequantized, requantized",
            fix="Convert it first: qlora-kit adapters convert",
        )


def _rows(layer: Any) -> torch.Tensor:
    """A plain layer's weight, float32 [out, in]; a Conv1D stores it transposed."""
    weight: torch.Tensor = layer.weight.float()
    return weight.T if isinstance(layer, Conv1D) else weight
