"""The fields of the adapter section that all methods have. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from qlora_kit.section import Section, Text


class AdapterSettings(Section):
    """What all methods have."""

    method: str
    """How the base is adapted; docs/methods.md compares the methods."""
    trains_all: ClassVar[bool] = False
    """Whether every weight of the base is trained."""
    loads_whole: ClassVar[bool] = False
    """Whether the base is loaded unquantized, for the method to quantize it layer by layer."""
    fp32_tensors: ClassVar[int] = 0
    """How many of a layer's tensors, the last ones of `layer_sizes`, are float32 whatever `dtype` says."""
    keeps_output: ClassVar[bool] = False
    """Whether each adapted layer's output is kept until its backward pass, beside what its neighbours keep."""
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

    def check_layers(self, names: list[str]) -> None:
        """Refuses settings of a single layer that is none of the adapted layers `names`.

        Raises:
            AdapterError: names the setting, and what it could mean.
        """

    def kept_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        """Sizes of the float32 tensors that the method keeps about such a layer from step to step."""
        return []

    def model_sizes(self, hidden: int) -> list[int]:
        """Sizes of the tensors that the method adds to a model of this width beside those of its layers."""
        return []

    @property
    def wanted_layers(self) -> str | list[str]:
        """Which linear layers get an adapter, as `target_modules` says it; none where a method adapts no layer."""
        return getattr(self, "target_modules", [])
