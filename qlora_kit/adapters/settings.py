"""The adapter section of a recipe: one class of settings for each method. Imports no torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from qlora_kit.adapters.base_settings import AdapterSettings
from qlora_kit.adapters.low_rank_settings import LowRankSettings
from qlora_kit.adapters.neighbour_settings import (
    BitFitSettings,
    BottleneckSettings,
    FullSettings,
    PromptTuningSettings,
)
from qlora_kit.adapters.pruned_settings import AdaLoraSettings, SoraSettings
from qlora_kit.adapters.svd_settings import LoftqSettings, PissaSettings
from qlora_kit.section import Section, Text


class GrowthStage(Section):
    """A rank that LoRA takes in the middle of training."""

    at: Annotated[float, Field(gt=0, lt=1)]
    """Share of the steps after which it grows."""
    rank: Annotated[int, Field(ge=1, le=1024)]
    """What it grows to."""


class LoraSettings(LowRankSettings):
    """LoRA's."""

    method: Literal["lora"] = "lora"
    """Low-rank adaptation (Hu et al. 2021): W + s B A."""
    growth: list[GrowthStage] = []
    """Larger ranks later in training: [{at: 0.5, rank: 16}], after that share of the steps. The scaling stays what
    `alpha` and `rank` say, and what was learned stays with its optimizer states: the function does not move."""
    init_from: Text | None = None
    """A run or a LoRA adapter's folder (ours or PEFT's) whose weights training starts from; `rank` may be larger."""
    init_optimizer: bool = False
    """Take over the optimizer's states too, from a finished run."""

    def at_step(self, step: int, total_steps: int) -> LoraSettings:
        """The settings with the rank that `growth` gives after `step`, and the alpha that keeps the scaling."""
        ranks = [stage.rank for stage in self.growth if step >= stage.at * total_steps]
        return self.of_rank(ranks[-1]) if ranks else self

    def of_rank(self, rank: int) -> LoraSettings:
        """The settings with another rank and the same scaling."""
        factor = math.sqrt(rank / self.rank) if self.use_rslora else rank / self.rank
        alphas = {name: alpha * factor for name, alpha in self.alpha_pattern.items()}
        return self.model_copy(update={"rank": rank, "alpha": self.alpha * factor, "alpha_pattern": alphas})

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        last = self.growth[-1].rank if self.growth else self.for_layer(name).rank
        return [last * in_features, last * out_features]

    @field_validator("growth")
    @classmethod
    def _stages_rise(cls, growth: list[GrowthStage], info: ValidationInfo) -> list[GrowthStage]:
        if growth and info.data.get("rank_pattern"):
            raise ValueError("cannot be had with rank_pattern")
        start = info.data.get("rank", 0)
        ranks, times = [start, *(stage.rank for stage in growth)], [stage.at for stage in growth]
        if any(a >= b for a, b in pairwise(ranks)) or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"must rise in `at` and in `rank`, from rank {start} on")
        return growth

    @field_validator("init_optimizer")
    @classmethod
    def _has_a_source(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("init_from"):
            raise ValueError("needs init_from")
        return value


class DoraSettings(LowRankSettings):
    """DoRA's."""

    method: Literal["dora"] = "dora"
    """Weight-decomposed adaptation (Liu et al. 2024): magnitude and direction of each row learn apart."""
    fp32_tensors: ClassVar[int] = 1
    """The magnitudes."""
    keeps_output: ClassVar[bool] = True

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return [*super().layer_sizes(name, in_features, out_features), out_features]

    def kept_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return [out_features]  # the squares of W's rows


class QaLoraSettings(LowRankSettings):
    """QA-LoRA's."""

    method: Literal["qa_lora"] = "qa_lora"
    """Group-wise LoRA (Xu et al. 2023): the delta is constant within a group of inputs; needs `base.quant: int4`."""
    group_size: Literal[32, 64, 128] = 32
    """Inputs that are summed before A; a multiple of base.block_size."""

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return super().layer_sizes(name, -(-in_features // self.group_size), out_features)


SETTINGS: dict[str, type[AdapterSettings]] = {
    "lora": LoraSettings,
    "dora": DoraSettings,
    "pissa": PissaSettings,
    "loftq": LoftqSettings,
    "adalora": AdaLoraSettings,
    "sora": SoraSettings,
    "qa_lora": QaLoraSettings,
    "bottleneck": BottleneckSettings,
    "prompt_tuning": PromptTuningSettings,
    "bitfit": BitFitSettings,
    "full": FullSettings,
}


def _tag(value: Any) -> str:
    method = value.get("method", "lora") if isinstance(value, dict) else getattr(value, "method", "lora")
    return f"<{method}>"


AnyAdapterSettings = Annotated[
    Annotated[LoraSettings, Tag("<lora>")]
    | Annotated[DoraSettings, Tag("<dora>")]
    | Annotated[PissaSettings, Tag("<pissa>")]
    | Annotated[LoftqSettings, Tag("<loftq>")]
    | Annotated[AdaLoraSettings, Tag("<adalora>")]
    | Annotated[SoraSettings, Tag("<sora>")]
    | Annotated[QaLoraSettings, Tag("<qa_lora>")]
    | Annotated[BottleneckSettings, Tag("<bottleneck>")]
    | Annotated[PromptTuningSettings, Tag("<prompt_tuning>")]
    | Annotated[BitFitSettings, Tag("<bitfit>")]
    | Annotated[FullSettings, Tag("<full>")],
    Discriminator(_tag),
]
"""The settings of the method that `method` names; LoRA's where it names none."""
