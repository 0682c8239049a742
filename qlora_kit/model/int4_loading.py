"""4-bit blocks made while transformers reads the weights in: of all linear layers, one at a time is whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.model.int4_blocks import INT4_GRID, Int4Blocks, Int4Grid, quantize_int4

_NAME = "qlora_kit_int4"


class PendingInt4(nn.Module):
    """Stands where a linear layer was until its weight is read; then `blocks` hold it. Never run."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)  # it stores its weight as [in, out]
        self.out_features, self.in_features = layer.weight.T.shape if self.transposed else layer.weight.shape
        self.weight, self.bias = layer.weight, layer.bias
        self.blocks: Int4Blocks | None = None


@register_quantization_config(_NAME)
class Int4Config(QuantizationConfigMixin):
    """What `from_pretrained` is told; `keep` are names of layers to leave as they are, None: the head."""

    def __init__(self, grid: Int4Grid = INT4_GRID, keep: list[str] | None = None) -> None:
        self.quant_method: Any = _NAME
        self.grid, self.keep = grid, keep


@register_quantizer(_NAME)
class Int4Quantizer(HfQuantizer):
    """Tells transformers' loader which weights to quantize, and how."""

    quantization_config: Int4Config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        keep = self.get_modules_to_not_convert(model, config.keep, getattr(model, "_keep_in_fp32_modules", None))
        for name, module in list(model.named_modules()):
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep):
                model.set_submodule(name, PendingInt4(module))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, own = param_name.rpartition(".")
        return own == "weight" and isinstance(model.get_submodule(name), PendingInt4)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.grid)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """A weight as it was read becomes its layer's blocks; the loader is given nothing in its place."""

    def __init__(self, grid: Int4Grid) -> None:
        self.grid = grid

    def convert(  # type: ignore[override]  # transformers' own quantizing operations answer so too
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.blocks = quantize_int4(weight.T if layer.transposed else weight, self.grid)
            layer._is_hf_initialized = True
            found[name] = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)
        return found
