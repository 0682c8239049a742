"""LoRA on a convolution: a narrow convolution, then one of kernel 1 (layout of PEFT)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.layer import AdaptedLayer, fresh_projection
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.settings import LowRankSettings
from qlora_kit.errors import AdapterError


class LoraConv(AdaptedLayer):
    """y = conv(x, W) + b + scaling · conv1(conv(dropout(x), A), B), with the base's stride, padding and dilation.

    Args:
        base: nn.Conv1d or nn.Conv2d; kept as submodule `base_layer`.
        settings: rank, scaling, dropout and dtype.

    lora_A [rank, in, *kernel] starts Kaiming-uniform, lora_B [out, rank, 1...] at zero. PEFT's layer knows no dilation
    and pads with zeros only; where the base has neither, both compute the same.

    Raises:
        AdapterError: the base has groups, of which each would need a product of its own.
    """

    base_layer: nn.Conv1d | nn.Conv2d

    def __init__(self, base: nn.Conv1d | nn.Conv2d, settings: LowRankSettings) -> None:
        super().__init__(base)
        if base.groups != 1:
            raise AdapterError(
                "a convolution with groups cannot be adapted",
                got=base.groups,
                allowed="groups=1",
                fix="Leave it out of target_modules",
            )
        for own in base.__constants__:  # models ask for them: Whisper for the stride
            setattr(self, own, getattr(base, own))
        self.rank, self.scaling, self.dropout = settings.rank, settings.scaling, settings.dropout
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        fresh = fresh_projection(self.rank, *base.weight.shape[1:])
        ones = (1,) * (base.weight.dim() - 2)
        self.lora_A = nn.Parameter(fresh.to(**kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, self.rank, *ones, **kind))

    @property
    def weight(self) -> Tensor:
        """The frozen kernel, of which image models ask the dtype."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in, length...] or without the batch, to [batch, out, length...], in x's dtype."""
        base, bias = self.base_layer, self.base_layer.bias
        y = base._conv_forward(x, base.weight, None if bias is None else bias.to(x.dtype))
        h = base._conv_forward(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype), None)
        widen = F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d
        return y + self.scaling * widen(h, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """scaling · B A, float32 [out, in, *kernel]."""
        a, b = self.lora_A.detach().float(), self.lora_B.detach().float()
        return self.scaling * (b.flatten(1) @ a.flatten(1)).view(self.base_layer.weight.shape)

    def merged_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        delta = self.delta()
        return {"weight": (self.base_layer.weight.detach().float() + delta, delta)}
