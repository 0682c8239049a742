"""Linear layers as com.microsoft.MatMulNBits: integer codes in blocks along the input, a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_kit.export.linear import MICROSOFT, DataFile, Linear, node
from qlora_kit.export.parameters import MergedWeights

BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
"""onnxruntime's fast kernels: activations are rounded to 8 bit, in blocks. 8-bit weights have no other."""


@dataclass(frozen=True)
class Blocks:
    """A weight [out, in] in codes: w = scale · (code - zero).

    Attributes:
        codes: uint8 [out, blocks, block_size], one to a byte, each below 2 ** bits.
        scales: float32 [out, blocks].
        zeros: uint8 [out, blocks]; None: 2 ** (bits - 1) everywhere.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dequantize(self, in_features: int) -> Tensor:
        """float32 [out, in]."""
        zeros = 2.0 ** (self.bits - 1) if self.zeros is None else self.zeros[..., None].float()
        return ((self.codes.float() - zeros) * self.scales[..., None]).flatten(1)[:, :in_features]


def as_blocks(weight: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """[out, in] to [out, blocks, block_size], filled up with zeros."""
    out_features, in_features = weight.shape
    return pad(weight, (0, -in_features % block_size)).view(out_features, -1, block_size)


def packed(codes: Tensor, bits: int) -> np.ndarray:
    """uint8 [..., n] to [..., ceil(n · bits / 8)]; of 4-bit codes the even one is in the low half of a byte."""
    if bits == 4:
        codes = pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    array: np.ndarray = codes.contiguous().numpy()
    return array


def write_blocks(linear: Linear, blocks: Blocks, in_features: int, data: DataFile) -> list[onnx.NodeProto]:
    """Writes codes, scales and zero points; returns the node that computes with them."""
    out_features, _, block_size = blocks.codes.shape
    inputs = [
        linear.node.input[0],
        data.add(f"{linear.prefix}.weight_Q{blocks.bits}", packed(blocks.codes, blocks.bits)),
        data.add(f"{linear.prefix}.weight_scales", blocks.scales.numpy()),
    ]
    if blocks.zeros is not None:
        inputs.append(data.add(f"{linear.prefix}.weight_zero_points", packed(blocks.zeros, blocks.bits)))
    shape = {"K": in_features, "N": out_features, "bits": blocks.bits, "block_size": block_size}
    shape |= {"accuracy_level": ACCURACY_LEVEL}
    return [node("MatMulNBits", inputs, linear.node.output[0], MICROSOFT, **shape)]


def round_8bit(weight: Tensor) -> Blocks:
    """8-bit codes of `weight` float32 [out, in], symmetric around 128: each block's largest value is ±127."""
    values = as_blocks(weight)
    scales = values.abs().amax(2) / 127
    codes = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round() + 128
    return Blocks(8, codes.to(torch.uint8), scales, None)


class Rounded8:
    """MatMulNBits of 8 bit."""

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """Rounds and writes the layer."""
        weight = linear.weight(weights)
        return write_blocks(linear, round_8bit(weight), weight.shape[1], data)
