"""Linear layers as com.microsoft.MatMulNBits: integer codes in blocks along the input, a scale for each block.

Scales lie on disk in fp16, behind a Cast that onnxruntime folds while it loads: the kernel sees fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from torch import Tensor

from qlora_kit.export.grid4 import Blocks, round_4bit, round_8bit
from qlora_kit.export.linear import MICROSOFT, DataFile, Linear, Tensors, node
from qlora_kit.export.parameters import MergedWeights
from qlora_kit.model.int4_blocks import pack_4bit

BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
"""onnxruntime's fast kernels: activations are rounded to 8 bit, in blocks. 8-bit weights have no other."""


@dataclass(frozen=True)
class Rounded8:
    """8 bit, symmetric."""

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """Rounds and writes the layer."""
        weight = linear.weight(weights)
        return write_blocks(linear, round_8bit(weight, BLOCK_SIZE), weight.shape[1], data)


@dataclass(frozen=True)
class Rounded4:
    """4 bit with zero points.

    Attributes:
        moments: of the inputs of layers, by name: [in, in]. A diagonal alone, [in], is not rounded by.
    """

    moments: Mapping[str, Tensor]

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """Rounds and writes the layer."""
        weight = linear.weight(weights)
        moment = self.moments.get(linear.layer)
        whole = moment is not None and moment.dim() == 2
        blocks = round_4bit(weight, BLOCK_SIZE, moment if whole else None)
        return write_blocks(linear, blocks, weight.shape[1], data)


def write_blocks(linear: Linear, blocks: Blocks, in_features: int, data: DataFile) -> list[onnx.NodeProto]:
    """Writes codes, scales and zero points; returns the node that computes with them."""
    out_features, _, block_size = blocks.codes.shape
    inputs = [
        linear.node.input[0],
        data.add(codes_name(linear, blocks.bits), packed(blocks.codes, blocks.bits)),
        data.add_half(scales_name(linear), blocks.scales.numpy()),
    ]
    if blocks.zeros is not None:
        inputs.append(data.add(f"{linear.prefix}.weight_zero_points", packed(blocks.zeros, blocks.bits)))
    shape = {"K": in_features, "N": out_features, "bits": blocks.bits, "block_size": block_size}
    shape |= {"accuracy_level": ACCURACY_LEVEL}
    return [node("MatMulNBits", inputs, linear.node.output[0], MICROSOFT, **shape)]


def codes_name(linear: Linear, bits: int) -> str:
    """Name of a layer's codes."""
    return f"{linear.prefix}.weight_Q{bits}"


def scales_name(linear: Linear) -> str:
    """Name of a layer's scales."""
    return f"{linear.prefix}.weight_scales"


def lookup_nodes(gather: onnx.NodeProto, head: Linear, in_features: int, data: DataFile) -> list[onnx.NodeProto]:
    """What takes the place of an embedding's Gather: rows of the 8-bit codes of the head that it is."""
    y = gather.output[0]
    rows = data.add(f"{head.prefix}.rows", np.array([head.rows[0].count, in_features]))
    return [
        node("Reshape", [codes_name(head, 8), rows], f"{y}/codes"),
        lookup(gather, f"{y}/codes", scales_name(head)),
    ]


def embedding_nodes(gather: onnx.NodeProto, weight: Tensor, data: Tensors) -> list[onnx.NodeProto]:
    """What takes the place of the Gather of an embedding float32 [vocab, width]: rows of 8-bit codes of its own."""
    blocks, table = round_8bit(weight, BLOCK_SIZE), gather.input[0]
    codes = data.add(f"{table}_Q8", blocks.codes.flatten(1).numpy())
    return [lookup(gather, codes, data.add_half(f"{table}_scales", blocks.scales.numpy()))]


def lookup(gather: onnx.NodeProto, codes: str, *scales: str) -> onnx.NodeProto:
    """What reads rows of 8-bit codes [rows, width] in the place of `gather`; `scales`: and zero points, if any."""
    places = {"bits": 8, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
    inputs = [codes, gather.input[1], *scales]
    return node("GatherBlockQuantized", inputs, gather.output[0], MICROSOFT, **places)


def packed(codes: Tensor, bits: int) -> np.ndarray:
    """uint8 [..., n] to [..., ceil(n · bits / 8)]; of 4-bit codes the even one is in the low half of a byte."""
    array: np.ndarray = (pack_4bit(codes) if bits == 4 else codes).contiguous().numpy()
    return array
