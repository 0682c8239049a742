"""Settings of the methods with two low-rank factors: what LoRA and its kin share, and what AdaLoRA does too."""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from qlora_kit.adapters.base_settings import AdapterSettings
from qlora_kit.errors import AdapterError
from qlora_kit.section import Positive, Share, TextOrTexts


class FactorSettings(AdapterSettings):
    """What all methods with two factors B and A have."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Columns of B and rows of A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The delta is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: Share = 0.0
    """Dropout on the input of A."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """B learns this many times faster than A: LoRA+ (Hayou et al. 2024), which advises 16. Not in embeddings."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases of the base are trained as well."""
    target_modules: TextOrTexts = "all-linear"
    """`all-linear` (all but the head), a regular expression that matches whole names, or a list of name endings."""

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied with."""
        return self.alpha / self.rank


class LowRankSettings(FactorSettings):
    """What LoRA and its kin have."""

    use_rslora: bool = False
    """Rank-stabilized scaling (Kalajdzievski 2023)."""
    rank_pattern: dict[str, Positive] = {}
    """Ranks of single layers, by name ending or regular expression: {q_proj: 32}."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single layers, by name ending or regular expression."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def for_layer(self, name: str) -> Self:
        """The settings of one layer: its own rank and alpha, where a pattern names it."""
        rank, alpha = _match(self.rank_pattern, name), _match(self.alpha_pattern, name)
        changes: dict[str, Any] = {"rank": rank or self.rank, "alpha": alpha or self.alpha}
        return self.model_copy(update=changes)

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        rank = self.for_layer(name).rank
        return [rank * in_features, rank * out_features]

    def check_layers(self, names: list[str]) -> None:
        endings = sorted({name.rsplit(".", 1)[-1] for name in names})
        for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in pattern:
                if not any(_matches(key, name) for name in names):
                    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], endings, n=1)
                    raise AdapterError(
                        f"adapter.{field} matches no layer that gets an adapter",
                        got=key,
                        allowed=", ".join(endings),
                        fix=f"did you mean {close[0]}?" if close else "",
                    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, pattern: dict[str, Any]) -> dict[str, Any]:
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is not a regular expression: {error}") from None
        return pattern


def _match(pattern: dict[str, Any], name: str) -> Any:
    """The value of the first key that is an ending of `name`, or matches it as PEFT matches keys; None without one."""
    return next((value for key, value in pattern.items() if _matches(key, name)), None)


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
