"""The adapter section of a recipe: one class of settings for each method. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from qlora_kit.section import Positive, Section, Share, Text, TextOrTexts


class AdapterSettings(Section):
    """What all methods have."""

    method: str
    """How the base is adapted; docs/methods.md compares the methods."""
    modules_to_save: list[Text] = []
    """Modules trained in full and saved with the adapter; a tied head stays tied."""
    new_tokens: list[Text] = []
    """Tokens added to the vocabulary; embedding and head are then trained and saved."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Storage of the adapter's weights."""
    keep_precision: bool = True
    """Keep the low 16 bits of a bf16 weight beside it, so that small updates are not lost (2 bytes a weight)."""

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        """Sizes of the tensors that the method adds to a linear layer that it adapts."""
        return []


class LowRankSettings(AdapterSettings):
    """What LoRA and its kin have."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Columns of B and rows of A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The delta is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    use_rslora: bool = False
    """Rank-stabilized scaling (Kalajdzievski 2023)."""
    rank_pattern: dict[str, Positive] = {}
    """Ranks of single layers, by name ending or regular expression: {q_proj: 32}."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single layers, by name ending or regular expression."""
    dropout: Share = 0.0
    """Dropout on the input of A."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """B learns this many times faster than A: LoRA+ (Hayou et al. 2024), which advises 16."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases of the base are trained as well."""
    target_modules: TextOrTexts = "all-linear"
    """`all-linear` (all but the head), a regular expression that matches whole names, or a list of name endings."""

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def for_layer(self, name: str) -> LowRankSettings:
        """The settings of one layer: its own rank and alpha, where a pattern names it."""
        rank, alpha = _match(self.rank_pattern, name), _match(self.alpha_pattern, name)
        changes: dict[str, Any] = {"rank": rank or self.rank, "alpha": alpha or self.alpha}
        return self.model_copy(update=changes)

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        rank = self.for_layer(name).rank
        return [rank * in_features, rank * out_features]

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, pattern: dict[str, Any]) -> dict[str, Any]:
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is not a regular expression: {error}") from None
        return pattern


class LoraSettings(LowRankSettings):
    """LoRA's."""

    method: Literal["lora"] = "lora"
    """Low-rank adaptation (Hu et al. 2021): W + s B A."""


class DoraSettings(LowRankSettings):
    """DoRA's."""

    method: Literal["dora"] = "dora"
    """Weight-decomposed adaptation (Liu et al. 2024): magnitude and direction of each row learn apart."""

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        return [*super().layer_sizes(name, in_features, out_features), out_features]


def _match(pattern: dict[str, Any], name: str) -> Any:
    """The value of the first key that is an ending of `name`, or matches it as PEFT matches keys; None without one."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


SETTINGS: dict[str, type[AdapterSettings]] = {"lora": LoraSettings, "dora": DoraSettings}


def _tag(value: Any) -> str:
    method = value.get("method", "lora") if isinstance(value, dict) else getattr(value, "method", "lora")
    return f"<{method}>"


AnyAdapterSettings = Annotated[
    Annotated[LoraSettings, Tag("<lora>")] | Annotated[DoraSettings, Tag("<dora>")],
    Discriminator(_tag),
]
"""The settings of the method that `method` names; LoRA's where it names none."""
