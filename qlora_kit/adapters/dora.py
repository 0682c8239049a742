"""DoRA: the magnitude of each row of a weight learns apart from its direction (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_kit.adapters.layer import LinearLayer, SideBranch
from qlora_kit.adapters.lora import LoraLinear, LowRank
from qlora_kit.adapters.peft_config import read_low_rank_config
from qlora_kit.adapters.settings import DoraSettings, LowRankSettings
from qlora_kit.kernels.dora_linear import SMALLEST_NORM, dora_linear, dora_linear_reference


class DoraLinear(LoraLinear):
    """y = m / ‖W + s B A‖ ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b, with one norm and one m for each row of W (equation 5).

    lora_magnitude, float32 [out], starts at the norms of W's rows, so that training starts at the base's function.
    """

    row_squares: Tensor

    def __init__(self, base: LinearLayer, settings: LowRankSettings) -> None:
        super().__init__(base, settings)
        norms = torch.linalg.vector_norm(self.expand(torch.float32), dim=1)
        self.register_buffer("row_squares", norms.square(), persistent=False)
        self.lora_magnitude = nn.Parameter(norms)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        weights = (self.lora_A, self.lora_B, self.lora_magnitude)
        if self.training and self.dropout > 0:
            return dora_linear_reference(x, self.expand, self.bias, *weights, self.scaling, self.dropout)
        return dora_linear(x, self.expand, self.bias, *weights, self.row_squares, self.scaling)

    def merged(self) -> tuple[Tensor, Tensor]:
        """(m / ‖W + s B A‖ ⊙ (W + s B A), what that adds to W), float32 [out, in]."""
        weight = self.expand(torch.float32)
        whole = weight + self.delta()
        whole *= (self.lora_magnitude.detach().float() / whole.norm(dim=1).clamp_min(SMALLEST_NORM))[:, None]
        return whole, whole - weight

    def branch(self) -> SideBranch:
        norms = (self.expand(torch.float32) + self.delta()).norm(dim=1).clamp_min(SMALLEST_NORM)
        return super().branch()._replace(row_scale=self.lora_magnitude.detach().float() / norms)


class Dora(LowRank[DoraSettings]):
    """DoRA."""

    stored_as: ClassVar[dict[str, str]] = {**LowRank.stored_as, "lora_magnitude": "lora_magnitude_vector"}
    layer_class = DoraLinear

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return super().reads(config) and bool(config.get("use_dora"))

    def config(self, model: Any) -> dict[str, Any]:
        return super().config(model) | {"use_dora": True}

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> DoraSettings:
        return read_low_rank_config(DoraSettings, config, tensors, origin)
