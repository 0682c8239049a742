"""LoRA: low-rank deltas beside frozen linear layers (Hu et al. 2021; rsLoRA scaling: Kalajdzievski 2023, eq. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.kernels.frozen_linear import ExpandWeight
from qlora_kit.kernels.lora_linear import lora_linear, lora_linear_reference
from qlora_kit.model.quantized import QuantizedLinear

LinearLayer = nn.Linear | Conv1D | QuantizedLinear


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA adapter is, apart from its weights. Fields as in the recipe's adapter section."""

    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    new_tokens: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.bfloat16

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraLinear(nn.Module):
    """y = base(x) + scaling · B A dropout(x), the base frozen.

    Args:
        base: nn.Linear, Conv1D (GPT-2) or QuantizedLinear; kept as submodule `base_layer`.
        settings: rank, scaling, dropout and dtype.

    lora_A [rank, in] starts Kaiming-uniform with a = sqrt(5), lora_B [out, rank] at zero, as in the reference
    implementation (microsoft/LoRA), so that training starts at the base model's function.
    """

    def __init__(self, base: LinearLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling, self.dropout = settings.scaling, settings.dropout
        self.in_features, self.out_features = linear_shape(base)
        device = next(tensor.device for tensor in (*base.buffers(), *base.parameters()))
        shape_a, shape_b = (settings.rank, self.in_features), (self.out_features, settings.rank)
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=settings.dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=settings.dtype, device=device))
        fresh = torch.empty(shape_a)  # drawn on the CPU, rounded to bf16: the same on every device, in every dtype
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
        self.lora_A.data.copy_(fresh.bfloat16())

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    @property
    def expand(self) -> ExpandWeight:
        return weight_expander(self.base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        if self.training and self.dropout > 0:
            return lora_linear_reference(
                x, self.expand, self.bias, self.lora_A, self.lora_B, self.scaling, self.dropout
            )
        return lora_linear(x, self.expand, self.bias, self.lora_A, self.lora_B, self.scaling)

    def delta(self) -> Tensor:
        """scaling · B A, float32 [out, in]."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


def linear_shape(layer: LinearLayer) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; Conv1D stores its weight as [in, out]."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def weight_expander(layer: LinearLayer) -> ExpandWeight:
    """The function that gives a frozen layer's weight [out, in] in a dtype."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize
    weight = layer.weight.detach()
    return (weight.T if isinstance(layer, Conv1D) else weight).to
