"""Settings of the methods that prune ranks while they train."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qlora_kit.adapters.low_rank_settings import FactorSettings, LowRankSettings
from qlora_kit.section import Positive, Share


class AdaLoraSettings(FactorSettings):
    """AdaLoRA's."""

    method: Literal["adalora"] = "adalora"
    """Adaptive budget (Zhang et al. 2023): W + s P Λ Q starts wide and keeps ranks where they matter most."""
    fp32_tensors: ClassVar[int] = 1
    """Λ."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Ranks that a layer keeps on average; single layers keep more or fewer, or none."""
    init_rank: Annotated[int, Field(ge=1, le=2048)] | None = None
    """Ranks that every layer starts with; 1.5 × rank where it is null."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """P Λ Q is scaled by alpha / init_rank."""
    warmup_share: Share = 0.1
    """Share of the steps before the first rank is pruned."""
    final_share: Share = 0.5
    """Share of the steps, the last ones, in which the kept ranks are trained on and no longer change."""
    prune_every: Positive = 10
    """Steps from one pruning to the next."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the sensitivity of a weight."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the uncertainty of a sensitivity."""
    orth_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight in the loss of how far P and Q are from orthogonal."""

    @property
    def start_rank(self) -> int:
        """Ranks of every layer at the start."""
        return self.init_rank or math.ceil(1.5 * self.rank)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.start_rank + 1e-5)  # PEFT's division, so that files can be exchanged

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return [self.start_rank * in_features, self.start_rank * out_features, self.start_rank]

    def kept_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        weights = sum(self.layer_sizes(name, in_features, out_features))
        return [weights, weights]  # sensitivity and uncertainty of each

    @model_validator(mode="after")
    def _a_budget_can_fall(self) -> Self:
        if self.start_rank < self.rank:
            raise ValueError(f"init_rank {self.init_rank} is less than rank {self.rank}")
        if self.warmup_share + self.final_share >= 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and final_share {self.final_share} leave no step for pruning: "
                "give shares that add up to less than 1"
            )
        return self


class SoraSettings(LowRankSettings):
    """SoRA's."""

    method: Literal["sora"] = "sora"
    """Sparse low rank (Ding et al. 2023): a gate on each rank; gates that reach zero are removed with their ranks."""
    fp32_tensors: ClassVar[int] = 1
    """The gates."""
    sparse_lambda: Annotated[float, Field(ge=0)] = 1.0
    """After each step a gate moves sparse_lambda × lr towards zero; gates start like a standard normal draw."""

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return [*super().layer_sizes(name, in_features, out_features), self.for_layer(name).rank]
