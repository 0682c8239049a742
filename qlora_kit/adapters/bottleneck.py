"""Bottleneck adapters: a small network with a residual path after parts of a layer (Houlsby et al. 2019)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import inject_layers
from qlora_kit.adapters.layer import LINEAR, AdaptedLinear, LinearLayer
from qlora_kit.adapters.method import DTYPES, Method, dtype_name
from qlora_kit.adapters.own_format import own_config, read_own_config
from qlora_kit.adapters.settings import BottleneckSettings
from qlora_kit.errors import AdapterError
from qlora_kit.kernels.frozen_linear import frozen_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckLinear(AdaptedLinear):
    """y = h + up(act(down(h))) with h = base(x), the base frozen (Houlsby et al. 2019, figure 2; Pfeiffer et al. 2020).

    The last layer of a part of the model is wrapped, so that the adapter comes before the part's residual path and
    the norm after it, and before a dropout between. (The library `adapters` computes `double_seq_bn` so; its `seq_bn`
    gives the adapter the sum with the residual path, which `placement: pfeiffer` does not.)

    down [width, out] starts Kaiming-uniform with a = sqrt(5), up [out, width] and both biases at
    zero (He et al. 2022, arXiv:2110.04366, section 4.1): training starts at the base's function exactly, where
    Houlsby et al. start close to it.
    """

    def __init__(self, base: LinearLayer, settings: BottleneckSettings) -> None:
        super().__init__(base)
        self.activation = settings.activation
        width = settings.width(self.out_features)
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        self.down = nn.Parameter(torch.empty(width, self.out_features, **kind))
        self.down_bias = nn.Parameter(torch.zeros(width, **kind))
        self.up = nn.Parameter(torch.zeros(self.out_features, width, **kind))
        self.up_bias = nn.Parameter(torch.zeros(self.out_features, **kind))
        # Drawn on the CPU, rounded to bf16: the same on every device, in every dtype.
        fresh = torch.empty(width, self.out_features)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
        self.down.data.copy_(fresh.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        hidden = frozen_linear(x, self.expand, self.bias)
        down, down_bias, up, up_bias = (
            weight.to(hidden.dtype) for weight in (self.down, self.down_bias, self.up, self.up_bias)
        )
        narrow = ACTIVATIONS[self.activation](F.linear(hidden, down, down_bias))  # [..., width]
        return hidden + F.linear(narrow, up, up_bias)


class Bottleneck(Method[BottleneckSettings]):
    """Bottleneck adapters, stored in a format of this toolkit."""

    peft_type = "QLORA_KIT_BOTTLENECK"
    stored_as: ClassVar[dict[str, str]] = {
        "down": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }
    cannot_merge = "a bottleneck adapter is not linear, so no weights of the base compute the same"

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        if targets is None and self.settings.target_modules == "auto":
            self._check_parts(model)
        return inject_layers(model, self.settings, lambda layer, _: BottleneckLinear(layer, self.settings), targets)

    def _check_parts(self, model: PreTrainedModel) -> None:
        """Refuses a model in which the names of a part's last layer are not known."""
        linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
        for part, pattern in self.settings.parts().items():
            if not any(re.fullmatch(pattern, name) for name in linear):
                endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise AdapterError(
                    f"no output projection of the {part} is known in {type(model).__name__}",
                    fix=f"Name it in adapter.target_modules, among {', '.join(endings)}",
                )

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return own_config(self.settings)

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> BottleneckSettings:
        dtype = dtype_name(tensors, tuple(cls.stored_as.values()))
        return read_own_config(BottleneckSettings, config, origin, dtype=dtype)
