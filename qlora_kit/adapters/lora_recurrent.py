"""LoRA on the weights of a recurrent layer: each matrix of an LSTM or GRU gets a low-rank delta (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlora_kit.adapters.layer import AdaptedLayer, fresh_projection
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.settings import LowRankSettings
from qlora_kit.errors import AdapterError


class LoraRecurrent(AdaptedLayer):
    """The base with W + scaling · B A in the place of each of its weights W (input, hidden, projection).

    Args:
        base: nn.LSTM or nn.GRU, of any depth, direction and layout; kept as submodule `base_layer`.
        settings: rank, scaling and dtype.

    lora_A.NAME [rank, in] starts Kaiming-uniform, lora_B.NAME [out, rank] at zero, for NAME as the base names its
    weights (weight_ih_l0, weight_hh_l0_reverse, ...). On disk they have the same names; PEFT has no such layer.
    The sum is made once a call, and takes the base's kernel over all steps: a delta applied apart would have to enter
    each step of the recurrence.

    Raises:
        AdapterError: dropout is asked for, which has no place in a sum of weights.
    """

    base_layer: nn.LSTM | nn.GRU

    def __init__(self, base: nn.LSTM | nn.GRU, settings: LowRankSettings) -> None:
        super().__init__(base)
        if settings.dropout:
            raise AdapterError(
                f"adapter.dropout on {type(base).__name__}",
                got=settings.dropout,
                allowed="0",
                fix="Leave it out, or leave the layer out of target_modules",
            )
        self.rank, self.scaling = settings.rank, settings.scaling
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in base.named_parameters():
            if name.startswith("weight_"):
                self.lora_A[name] = nn.Parameter(fresh_projection(self.rank, weight.shape[1]).to(**kind))
                self.lora_B[name] = nn.Parameter(torch.zeros(weight.shape[0], self.rank, **kind))

    def forward(self, x: Any, hx: Any = None) -> Any:
        """As the base's: x a tensor or a packed sequence, hx the states to start from or None."""
        weights = {name: self._whole(name) for name, _ in self.base_layer.named_parameters()}
        return functional_call(self.base_layer, weights, (x, hx))

    def _whole(self, name: str) -> Tensor:
        """The base's weight with its delta, or a bias, in the dtype of the base's weights."""
        value = getattr(self.base_layer, name)
        if name not in self.lora_A:
            return value.to(self.base_layer.weight_ih_l0.dtype)
        product = self.lora_B[name].to(value.dtype) @ self.lora_A[name].to(value.dtype)
        return value + self.scaling * product

    def merged_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name in self.lora_A:
            delta = self.scaling * (self.lora_B[name].detach().float() @ self.lora_A[name].detach().float())
            found[name] = getattr(self.base_layer, name).detach().float() + delta, delta
        return found
