"""BitFit: the base's biases are trained and nothing else (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import inject_layers, trainable_parameters
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.own_format import own_config, read_own_config
from qlora_kit.adapters.settings import BitFitSettings
from qlora_kit.errors import AdapterError


class BitFit(Method[BitFitSettings]):
    """All biases of the base, those of norms and of quantized layers included; stored as they are named."""

    peft_type = "QLORA_KIT_BITFIT"

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        """Raises an AdapterError where the base has no biases."""
        inject_layers(model, self.settings, None, [])
        if not any(name.rpartition(".")[2].startswith("bias") for name in trainable_parameters(model)):
            raise AdapterError(
                f"adapter.method bitfit: {type(model).__name__} has no biases to train",
                fix="Take a method that adds weights of its own: lora, dora, bottleneck, prompt_tuning",
            )
        return []

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return own_config(self.settings)

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> BitFitSettings:
        return read_own_config(BitFitSettings, config, origin)
