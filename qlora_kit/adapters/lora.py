"""LoRA: low-rank deltas beside frozen linear layers (Hu et al. 2021; rsLoRA scaling: Kalajdzievski 2023, eq. 5)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.growth import take_rank
from qlora_kit.adapters.inject import Kinds, adapted_layers, inject_layers
from qlora_kit.adapters.layer import LINEAR, AdaptedLayer, AdaptedLinear, LinearLayer, SideBranch, fresh_projection
from qlora_kit.adapters.lora_conv import LoraConv
from qlora_kit.adapters.lora_embedding import LoraEmbedding
from qlora_kit.adapters.lora_recurrent import LoraRecurrent
from qlora_kit.adapters.low_rank_settings import FactorSettings
from qlora_kit.adapters.method import DTYPES, Gain, Method, plain_size
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

    def __init__(self, base: LinearLayer, settings: FactorSettings) -> None:
        super().__init__(base)
        self.rank, self.scaling, self.dropout = settings.rank, settings.scaling, settings.dropout
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.rank, **kind))
        self.lora_A.data.copy_(fresh_projection(self.rank, self.in_features))

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

    def branch(self) -> SideBranch:
        return SideBranch(self.lora_A.detach().float(), self.scaling * self.lora_B.detach().float())


class LowRank(Method[L]):
    """A method whose adapter is one layer of `layer_class` for each target."""

    peft_type = "LORA"
    stored_as: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    layer_class: ClassVar[type[LoraLinear]] = LoraLinear
    kinds: ClassVar[Kinds] = LINEAR

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        return inject_layers(model, self.settings, self.make_layer, targets, self.kinds)

    def make_layer(self, base: Any, name: str) -> AdaptedLayer:
        """A fresh adapted layer around the frozen layer `base`, which is called `name`."""
        return self.layer_class(base, self.settings.for_layer(name))

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return low_rank_config(model, self.settings)

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        check_low_rank_config(config, origin)

    def lr_factor(self, name: str) -> float:
        return self.settings.lr_ratio if "lora_B" in name.split(".")[-2:] else 1.0


LAYERS: dict[type[nn.Module], Callable[[Any, LowRankSettings], AdaptedLayer]] = {
    **dict.fromkeys(LINEAR, LoraLinear),
    nn.Embedding: LoraEmbedding,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
    nn.LSTM: LoraRecurrent,
    nn.GRU: LoraRecurrent,
}
"""What LoRA adapts, and the adapted layer of each."""


class Lora(LowRank[LoraSettings]):
    """LoRA; with lr_ratio, LoRA+. Beside linear layers it adapts embeddings, convolutions and recurrent layers."""

    stored_as: ClassVar[dict[str, str]] = {
        **LowRank.stored_as,
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    }
    kinds = tuple(LAYERS)

    def __init__(self, settings: LoraSettings) -> None:
        super().__init__(settings)
        self._at_start = settings

    def resize(
        self, model: PreTrainedModel, step: int, total_steps: int, gain: Gain = plain_size
    ) -> dict[str, nn.Parameter]:
        return self.change_rank(model, self._at_start.at_step(step, total_steps), gain)

    def change_rank(self, model: nn.Module, settings: LoraSettings, gain: Gain = plain_size) -> dict[str, nn.Parameter]:
        """Gives each layer the rank that `settings` have for it. Returns the new parameters by name.

        A layer that grows computes what it did: of the new rows of A and columns of B, those of one are zero.
        """
        self.settings = settings
        resized = [
            (name, of) for name, of in adapted_layers(model) if cast(Any, of).rank != settings.for_layer(name).rank
        ]
        factor = gain() if resized else 1.0
        changed: dict[str, nn.Parameter] = {}
        for name, layer in resized:
            fresh = take_rank(layer, self.make_layer(layer.base_layer, name), factor)
            changed |= {f"{name}.{own}": parameter for own, parameter in fresh.items()}
        return changed

    def make_layer(self, base: Any, name: str) -> AdaptedLayer:
        settings = self.settings.for_layer(name)
        return next(made for kind, made in LAYERS.items() if isinstance(base, kind))(base, settings)

    @classmethod
    def layer_of(cls, key: str) -> str | None:
        recurrent = re.fullmatch(r"(.+)\.lora_[AB]\.weight_(ih|hh|hr)_l\d+(_reverse)?", key)
        return recurrent[1] if recurrent else super().layer_of(key)

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        start = str(config.get("init_lora_weights")).lower()
        return super().reads(config) and not config.get("use_dora") and not start.startswith(("pissa", "loftq"))

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> LoraSettings:
        return read_low_rank_config(LoraSettings, config, tensors, origin)
