"""LoRA: low-rank deltas beside frozen linear layers (Hu et al. 2021; rsLoRA scaling: Kalajdzievski 2023, eq. 5)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import inject_layers
from qlora_kit.adapters.layer import AdaptedLinear, LinearLayer
from qlora_kit.adapters.method import DTYPES, Method
from qlora_kit.adapters.peft_config import check_low_rank_config, low_rank_config, read_low_rank_config
from qlora_kit.adapters.settings import LoraSettings, LowRankSettings
from qlora_kit.kernels.lora_linear import lora_linear, lora_linear_reference

L = TypeVar("L", bound=LowRankSettings)


class LoraLinear(AdaptedLinear):
    """y = base(x) + scaling · B A dropout(x), the base frozen.

    Args:
        base: nn.Linear, Conv1D (GPT-2) or QuantizedLinear; kept as submodule `base_layer`.
        settings: rank, scaling, dropout and dtype.

    lora_A [rank, in] starts Kaiming-uniform with a = sqrt(5), lora_B [out, rank] at zero, as in the reference
    implementation (microsoft/LoRA), so that training starts at the base model's function.
    """

    def __init__(self, base: LinearLayer, settings: LowRankSettings) -> None:
        super().__init__(base)
        self.rank, self.scaling, self.dropout = settings.rank, settings.scaling, settings.dropout
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.rank, **kind))
        # Drawn on the CPU, rounded to bf16: the same on every device, in every dtype.
        fresh = torch.empty(self.rank, self.in_features)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
        self.lora_A.data.copy_(fresh.bfloat16())

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

    def merged(self) -> tuple[Tensor, Tensor]:
        """(W + scaling · B A, scaling · B A), float32 [out, in], W expanded in fp32."""
        delta = self.delta()
        return self.expand(torch.float32) + delta, delta


class LowRank(Method[L]):
    """A method whose adapter is one layer of `layer_class` for each target."""

    peft_type = "LORA"
    stored_as: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    layer_class: ClassVar[type[LoraLinear]] = LoraLinear

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        def wrap(layer: LinearLayer, name: str) -> AdaptedLinear:
            return self.layer_class(layer, self.settings.for_layer(name))

        return inject_layers(model, self.settings, wrap, targets)

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return low_rank_config(model, self.settings)

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        check_low_rank_config(config, origin)

    def lr_factor(self, name: str) -> float:
        return self.settings.lr_ratio if name.endswith("lora_B") else 1.0


class Lora(LowRank[LoraSettings]):
    """LoRA; with lr_ratio, LoRA+."""

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return super().reads(config) and not config.get("use_dora")

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> LoraSettings:
        return read_low_rank_config(LoraSettings, config, tensors, origin)
