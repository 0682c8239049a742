"""The one place where a delta meets a weight: dequantize, add in fp32, check, cast once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import input_embedding, is_tied_head, output_head, untie_head
from qlora_kit.adapters.layer import AdaptedLayer, AdaptedLinear
from qlora_kit.errors import ExportError
from qlora_kit.export.weight_files import WeightFiles
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import CodedEmbedding

T = TypeVar("T")
Hold = Callable[[str, Tensor], Tensor]
HELD = "held_by_the_merge"
"""Marks a parameter that is where it is to stay."""


@dataclass(frozen=True)
class LayerDelta:
    """How much a layer learned: Frobenius norms of what was added to the frozen weight, and of that."""

    name: str
    delta_norm: float
    weight_norm: float

    @property
    def ratio(self) -> float:
        return self.delta_norm / max(self.weight_norm, 1e-30)


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """Where it is, floats in float32."""
    return tensor.detach().float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def merge_adapter(
    model: nn.Module, hold: Hold = in_memory, adjusted: Callable[[str, QuantizedLinear, Tensor], Tensor] | None = None
) -> list[LayerDelta]:
    """Turns a tuned model into a plain one in fp32, in place, layer by layer.

    The adapter was trained against the dequantized base, so that is what it is merged onto.

    Args:
        hold: keeps a weight of that name from the moment it is merged on, in memory or elsewhere.
        adjusted: of a quantized layer's name, the layer, and the merged weight [out, in]: the weight to keep instead.

    Raises:
        ExportError: a merged weight is not finite; the layer is named.
    """
    report, transposed = [], conv1d_layers(model)
    if isinstance(input_embedding(model), AdaptedLayer) and is_tied_head(model, output_head(model)):
        untie_head(model)  # the delta is the embedding's alone
    _expand_tied(model, hold, adjusted)
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLayer):
            merged = module.merged_weights()
            report += [_checked(f"{name}.{key}" if len(merged) > 1 else name, *merged[key]) for key in merged]
            if isinstance(module, AdaptedLinear):
                weight, base = merged.pop("weight")[0], module.base_layer
                if adjusted and isinstance(base, QuantizedLinear):
                    weight = adjusted(name, base, weight)
                _replace(model, name, plain_linear(base, weight, name in transposed), hold)
                continue
            for key, (weight, _) in merged.items():
                setattr(module.base_layer, key, nn.Parameter(weight, requires_grad=False))
            _replace(model, name, module.base_layer)
        elif isinstance(module, QuantizedLinear) and not name.endswith(".base_layer"):
            weight = module.dequantize(torch.float32)
            weight = adjusted(name, module, weight) if adjusted else weight
            _replace(model, name, plain_linear(module, weight, name in transposed), hold)
    stored = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    for name, tensor in (*model.named_parameters(), *buffers):
        if not hasattr(tensor, HELD):
            tensor.data = hold(name, tensor.data)
    model.float()  # buffers that are not stored
    if isinstance(model, PreTrainedModel):
        model.config.dtype = torch.float32
    return report


def _expand_tied(
    model: nn.Module, hold: Hold, adjusted: Callable[[str, QuantizedLinear, Tensor], Tensor] | None
) -> None:
    """An embedding that reads the codes of the head becomes a plain one, and the head's weight its own, in place."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, CodedEmbedding):
            head, weight = module.head, module.head.dequantize(torch.float32)
            weight = adjusted(name, head, weight) if adjusted else weight
            plain = plain_linear(head, weight, as_conv1d=False)
            _replace(model, name, module.expanded(nn.Parameter(weight, requires_grad=False)), hold)
            plain.weight = model.get_submodule(name).weight
            _replace(model, next(place for place, other in modules.items() if other is head), plain)


def _checked(name: str, weight: Tensor, delta: Tensor) -> LayerDelta:
    if not torch.isfinite(weight).all():
        raise ExportError(f"{name}: the merged weight holds NaN or Inf", fix="Export an earlier checkpoint")
    return LayerDelta(name, delta.norm().item(), (weight - delta).norm().item())


def conv1d_layers(model: nn.Module) -> set[str]:
    """Names of the layers that the model's own class makes as Conv1D: once quantized, a layer does not tell."""
    if not isinstance(model, PreTrainedModel):  # such a one is not quantized
        found = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
        return {name.removesuffix(".base_layer") for name in found}
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, module in fresh.named_modules() if isinstance(module, Conv1D)}


def plain_linear(layer: nn.Module, weight: Tensor, as_conv1d: bool) -> nn.Module:
    """A plain layer with `weight` float32 [out, in] and the bias of `layer`; a Conv1D stores it as [in, out]."""
    out_features, in_features = weight.shape
    bias: Any = layer.bias
    if as_conv1d:
        plain: nn.Module = Conv1D(out_features, in_features)
        plain.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return plain


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, fill: Callable[[Hold], T]
) -> T:
    """Writes a Hugging Face folder (fp32 safetensors, configuration, tokenizer, template), whole or not at all.

    Args:
        fill: is given what writes a weight; what it returns is returned.

    Raises:
        ExportError: the disk is full, or something is in the way.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with WeightFiles(partial) as files:
            found = fill(files.hold)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        return found
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written: {error.strerror}", fix="Free some space and export again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(model: nn.Module, name: str, layer: nn.Module, hold: Hold | None = None) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    if hold:
        for key, parameter in layer.named_parameters():
            parameter.data = hold(f"{name}.{key}", parameter.data)
            setattr(parameter, HELD, True)
