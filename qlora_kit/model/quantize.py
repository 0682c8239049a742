"""Quantization one layer at a time, for methods that choose what of a weight is quantized.

A base that is loaded for them is whole, and carries a `Quantization`: what loading would have done to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_kit.errors import ModelError
from qlora_kit.model.int4_blocks import INT4_GRID, Int4Grid, quantize_int4
from qlora_kit.model.quantized import QuantizedLinear, bnb


@dataclass(frozen=True)
class Quantization:
    """How a base is quantized, and the full names of the layers that are."""

    kind: str = "none"
    """nf4, fp4, int8, int4 or none."""
    double_quant: bool = True
    names: frozenset[str] = frozenset()
    grid: Int4Grid = INT4_GRID
    head: str = "none"
    """Of the output head: int8, nf4 or none."""

    def options(self) -> dict[str, Any]:
        """The kind, and those of its options that decide over its bytes."""
        head: dict[str, Any] = {} if self.head == "none" else {"head": self.head}
        if self.head == "nf4":
            head["double_quant"] = self.double_quant
        if self.kind == "int4":
            return {"kind": self.kind, "grid": asdict(self.grid)} | head
        return {"kind": self.kind, "double_quant": self.double_quant} | head

    def quantize(self, weight: Tensor, bias: nn.Parameter | None) -> QuantizedLinear:
        """A layer of the codes and statistics that loading gives for `weight` [out, in], of a float dtype, on its
        device; `bias` [out] stays as it is."""
        out_features, in_features = weight.shape
        if self.kind == "int4":
            return QuantizedLinear.from_int4(quantize_int4(weight, self.grid), in_features, bias)
        layer: Any
        with torch.device("meta"):  # the weight that bitsandbytes would make is never there
            if self.kind == "int8":
                layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type=self.kind)
        if self.kind == "int8":
            # bitsandbytes quantizes to 8 bit on the way from the CPU to a device.
            layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
        else:
            options = {"quant_type": self.kind, "compress_statistics": self.double_quant}
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)
        layer.bias = bias
        return QuantizedLinear.from_bitsandbytes(layer)


def plan_quantization(
    model: Any, kind: str, double_quant: bool, skip_modules: list[str] | None, grid: Int4Grid = INT4_GRID
) -> None:
    """Marks a whole model, in place, with the quantization that loading it so would have given.

    Args:
        skip_modules: names, or name endings, of what stays as it is beside the head.

    Raises:
        ModelError: it has no layer to quantize.
    """
    skip = unquantized_names(model, skip_modules) if skip_modules else None
    keep = HfQuantizer.get_modules_to_not_convert(model, skip, getattr(model, "_keep_in_fp32_modules", None))
    names = frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    )
    if kind != "none" and not names:
        raise ModelError("the base has no linear layer to quantize", fix="Set base.quant=none")
    model.planned_quantization = Quantization(kind, double_quant, frozenset() if kind == "none" else names, grid)


def planned_quantization(model: Any) -> Quantization:
    """The mark of `plan_quantization`; without one, that nothing is to be quantized.

    Raises:
        ModelError: the model is quantized already.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if any(isinstance(module, QuantizedLinear) and module is not head for module in model.modules()):
        raise ModelError(
            "the base is quantized already, and the adapter's method needs it whole",
            fix="Load it with load_base(..., quantize_later=True)",
        )
    return getattr(model, "planned_quantization", Quantization())


def quantize_planned(model: nn.Module, spared: list[str]) -> None:
    """Quantizes the layers that are planned, but those named in `spared`, in place, one after the other."""
    plan = planned_quantization(model)
    for name in plan.names - set(spared):
        layer: Any = model.get_submodule(name)
        weight = layer.weight.detach()
        quantized = plan.quantize(weight.T if isinstance(layer, Conv1D) else weight, layer.bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)


def unquantized_names(model: PreTrainedModel, skip_modules: list[str]) -> list[str]:
    """Full names of what stays unquantized with all that lies in it: the head, and what `skip_modules` names."""
    names = [name for name, _ in model.named_modules() if f".{name}".endswith(tuple(f".{n}" for n in skip_modules))]
    return [*get_keys_to_not_convert(model), *names]
