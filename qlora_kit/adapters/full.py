"""Full fine-tuning: every weight of the base is trained, the yardstick that adapters are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.method import Method
from qlora_kit.adapters.own_format import own_config, read_own_config
from qlora_kit.adapters.settings import FullSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.quantized import QuantizedLinear


class Full(Method[FullSettings]):
    """All weights, a tied one once, stored as they are named; merging leaves them as they are."""

    peft_type = "QLORA_KIT_FULL"
    stores_all = True

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        """Makes every weight of `model` trainable; fp16 cannot hold updates, so there the model is cast to fp32.

        Raises:
            AdapterError: the base is quantized.
        """
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise AdapterError(
                "adapter.method full: quantized codes cannot be trained",
                fix="Set base.quant=none, or take a method that trains weights beside the codes: lora, dora",
            )
        # New tokens name embedding and head, which are trained in any case.
        self.settings = self.settings.model_copy(update={"modules_to_save": []})
        if model.dtype == torch.float16:
            model.float()
            model.config.dtype = torch.float32
        model.requires_grad_(True)
        return []

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return own_config(self.settings)

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> FullSettings:
        return read_own_config(FullSettings, config, origin)
