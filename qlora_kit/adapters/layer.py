"""A frozen layer with something trained beside it: what every adapter's layer has."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import AdapterError
from qlora_kit.kernels.frozen_linear import ExpandWeight
from qlora_kit.kernels.pieced_cross_entropy import ExpandPiece
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import expand_piece, vocabulary_pieces

LinearLayer = nn.Linear | Conv1D | QuantizedLinear
LINEAR = (nn.Linear, Conv1D, QuantizedLinear)


class SideBranch(NamedTuple):
    """What an adapter adds to the output of a frozen linear layer: y = row_scale ⊙ (x Wᵀ + (x Aᵀ) Bᵀ), all float32.

    a [rank, in], b [out, rank] with the scaling in it, row_scale [out]; None where nothing is scaled. With a
    group_size, x is summed over groups of so many inputs before A, [rank, groups].
    """

    a: Tensor
    b: Tensor
    row_scale: Tensor | None = None
    group_size: int | None = None

    def rows(self, first: int, count: int) -> SideBranch:
        """The part for `count` of the output's features."""
        place = slice(first, first + count)
        return self._replace(b=self.b[place], row_scale=None if self.row_scale is None else self.row_scale[place])


class AdaptedLayer(nn.Module):
    """Holds the frozen layer as submodule `base_layer`; subclasses add weights and the arithmetic."""

    base_layer: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def device(self) -> torch.device:
        return next(tensor.device for tensor in (*self.base_layer.buffers(), *self.base_layer.parameters()))

    def merged_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of a weight of the base to (the one that computes the same without adapter, what that adds), float32.

        Raises:
            AdapterError: no plain layer computes the same.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged", fix="Use the adapter beside its base")


class AdaptedLinear(AdaptedLayer):
    """An adapted linear layer, whatever stores its weight."""

    base_layer: LinearLayer

    def __init__(self, base: LinearLayer) -> None:
        super().__init__(base)
        self.in_features, self.out_features = linear_shape(base)

    @property
    def weight(self) -> nn.Parameter | None:
        """The frozen weight, of which T5 asks the dtype; None where it is held as codes."""
        return getattr(self.base_layer, "weight", None)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    @property
    def expand(self) -> ExpandWeight:
        return weight_expander(self.base_layer)

    def merged_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": self.merged()}

    def merged(self) -> tuple[Tensor, Tensor]:
        """(the weight of a plain layer that computes the same, its difference from W), float32 [out, in].

        Raises:
            AdapterError: no plain layer computes the same.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged", fix="Use the adapter beside its base")

    def branch(self) -> SideBranch:
        """What it computes beside its frozen layer.

        Raises:
            AdapterError: that is no low-rank product.
        """
        raise AdapterError(
            f"{type(self).__name__} adds no low-rank product to its frozen layer", fix="Export a merged profile: int8"
        )


def fresh_projection(*shape: int) -> Tensor:
    """A start for A, float32: Kaiming-uniform with a = sqrt(5), as in the reference implementation (microsoft/LoRA).

    Drawn on the CPU, rounded to bf16: the same on every device, in every dtype.
    """
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=math.sqrt(5)).bfloat16().float()


def linear_shape(layer: LinearLayer) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; Conv1D stores its weight as [in, out]."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def weight_expander(layer: LinearLayer) -> ExpandWeight:
    """The function that gives a frozen layer's weight [out, in] in a dtype."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize
    weight = layer.weight.detach()
    return (weight.T if isinstance(layer, Conv1D) else weight).to


def piece_expander(layer: LinearLayer) -> tuple[ExpandPiece, list[slice]] | None:
    """What expands some rows of a layer's weight, and which rows it takes; None where the weight is whole anyway."""
    if not isinstance(layer, QuantizedLinear):
        return None
    return partial(expand_piece, layer), vocabulary_pieces(layer)
