"""QA-LoRA: a delta that is constant within each quantization group (Xu et al. 2023, arXiv:2309.14717)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.layer import LinearLayer, SideBranch, fresh_projection
from qlora_kit.adapters.lora import LoraLinear, LowRank
from qlora_kit.adapters.peft_config import low_rank_config, read_low_rank_config
from qlora_kit.adapters.settings import QaLoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.kernels.frozen_linear import ExpandWeight, frozen_linear
from qlora_kit.kernels.lora_linear import lora_linear, lora_linear_reference
from qlora_kit.model.quantized import QuantizedLinear


class QaLoraLinear(LoraLinear):
    """y = base(x) + s B A pool(x): x summed over each group of inputs, so that A is [rank, groups].

    It computes as LoRA whose A is the same within a group, in LoRA's fused path. A starts √group_size times smaller
    than LoRA's would with so few columns: then A pool(x) is as large as LoRA's A x, and LoRA's learning rates fit.

    Raises:
        AdapterError: the frozen layer has no blocks, or blocks that reach over groups.
    """

    def __init__(self, base: LinearLayer, settings: QaLoraSettings) -> None:
        super().__init__(base, settings)
        self.group_size = settings.group_size
        if not isinstance(base, QuantizedLinear) or base.quant != "int4":
            got = base.quant if isinstance(base, QuantizedLinear) else "an unquantized layer"
            raise AdapterError(
                "adapter.method qa_lora keeps its delta constant within the blocks of an int4 base",
                got=got,
                fix="Set base.quant=int4, leave unquantized layers out of adapter.target_modules, or take lora",
            )
        if self.group_size % base.block_size:
            raise AdapterError(
                "adapter.group_size",
                got=self.group_size,
                allowed=f"multiples of the base's block size, {base.block_size}",
            )
        start = fresh_projection(self.rank, -(-self.in_features // self.group_size)) / math.sqrt(self.group_size)
        self.lora_A = nn.Parameter(start.to(self.lora_A))

    @property
    def widened(self) -> Tensor:
        """A for inputs that are not pooled, [rank, in]."""
        return widened(self.lora_A, self.group_size, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        wide = self.widened
        if self.training and self.dropout > 0:
            return lora_linear_reference(x, self.expand, self.bias, wide, self.lora_B, self.scaling, self.dropout)
        return lora_linear(x, self.expand, self.bias, wide, self.lora_B, self.scaling)

    def branch(self) -> SideBranch:
        b = self.scaling * self.lora_B.detach().float()
        if self.in_features % self.group_size:
            return SideBranch(self.widened.detach().float(), b)
        return SideBranch(self.lora_A.detach().float(), b, group_size=self.group_size)

    def delta(self) -> Tensor:
        """s B A, A widened, float32 [out, in]."""
        return self.scaling * (self.lora_B.detach().float() @ self.widened.detach().float())


def widened(a: Tensor, group_size: int, in_features: int) -> Tensor:
    """A [rank, groups] with each column as often as its group has inputs, [rank, in]."""
    return a.repeat_interleave(group_size, dim=1)[:, :in_features]


def qa_lora_reference(
    x: Tensor, expand: ExpandWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, group_size: int
) -> Tensor:
    """The layer as the paper's algorithm 1 writes it. x [..., in], a [rank, groups], b [out, rank] -> [..., out]."""
    padded = F.pad(x, (0, -x.shape[-1] % group_size))
    pooled = padded.unflatten(-1, (-1, group_size)).sum(-1)  # [..., groups]
    branch = F.linear(F.linear(pooled, a.to(x.dtype)), b.to(x.dtype))
    return frozen_linear(x, expand, bias) + scaling * branch


class QaLora(LowRank[QaLoraSettings]):
    """QA-LoRA. Its configuration names the inputs of layers whose last group is not full: the tensors do not tell."""

    peft_type = "QLORA_KIT_QA_LORA"
    layer_class: ClassVar[type[LoraLinear]] = QaLoraLinear

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        size = self.settings.group_size
        layers = [(name, layer) for name, layer in adapted_layers(model) if isinstance(layer, QaLoraLinear)]
        uneven = {name: layer.in_features for name, layer in layers if layer.in_features % size}
        return low_rank_config(model, self.settings) | {"group_size": size, "in_features": uneven}

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> QaLoraSettings:
        return read_low_rank_config(QaLoraSettings, config, tensors, origin, group_size=config.get("group_size"))


def widened_tensors(config: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a stored QA-LoRA adapter as LoRA's, for the same function: A [rank, groups] to [rank, in].

    Args:
        prefix: of the layers' names in `tensors`.
    """
    size, uneven, ending = config["group_size"], config.get("in_features") or {}, ".lora_A.weight"
    found = dict(tensors)
    for key, a in tensors.items():
        if key.endswith(ending):
            in_features = uneven.get(key.removeprefix(prefix).removesuffix(ending), a.shape[1] * size)
            found[key] = widened(a, size, in_features).contiguous()
    return found
