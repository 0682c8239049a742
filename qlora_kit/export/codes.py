"""The training base's own 4-bit codes in a graph, with the adapter as a float branch beside them.

com.microsoft.MatMulBnb4 takes the bytes that bitsandbytes made as they are. It wants one float32 absmax a block, so
nested statistics are expanded, in fp32 as training's reference does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from qlora_kit.adapters.layer import AdaptedLinear, SideBranch
from qlora_kit.errors import ExportError
from qlora_kit.export.linear import MICROSOFT, DataFile, Linear, node, read_tensor
from qlora_kit.export.parameters import MergedWeights
from qlora_kit.model.quantized import QuantizedLinear

QUANT_TYPES = {"fp4": 0, "nf4": 1}
"""bitsandbytes' names to MatMulBnb4's attribute."""
SPLIT = ":"


@dataclass(frozen=True)
class CodedLayer:
    """A frozen 4-bit layer, and what an adapter adds to its output."""

    base: QuantizedLinear
    branch: SideBranch | None

    def stored(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes of `count` rows, uint8 [count · in / 2], the even one in the high half of a byte, and float32 absmax.

        Raises:
            ExportError: the rows begin inside a block.
        """
        start, size = first * self.base.in_features, count * self.base.in_features
        if start % self.base.block_size:
            raise ExportError(
                f"rows that begin at {first} of a layer begin inside a block of {self.base.block_size} codes",
                fix="Export int8 or fp32",
            )
        codes = self.base.codes.view(torch.uint8).flatten()[start // 2 : (start + size + 1) // 2]
        blocks = slice(start // self.base.block_size, -(-(start + size) // self.base.block_size))
        return codes.cpu().numpy(), self.base.expanded_absmax()[blocks].cpu().numpy()

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """y = scale · (x Wᵀ + (x Aᵀ) Bᵀ), of which the adapter has what it has."""
        x, y = linear.node.input[0], linear.node.output[0]
        (rows,) = linear.rows
        codes, absmax = self.stored(rows.first, rows.count)
        tensors = [
            data.add(f"{linear.prefix}.weight_codes", codes),
            data.add(f"{linear.prefix}.weight_absmax", absmax),
        ]
        frozen = onnx.helper.make_node(
            "MatMulBnb4",
            [x, *tensors],
            [y if self.branch is None else f"{y}/frozen"],
            name=f"{rows.layer}{SPLIT}{rows.first}{SPLIT}{rows.count}",  # whose codes they are, for `same_codes`
            domain=MICROSOFT,
            K=self.base.in_features,
            N=rows.count,
            block_size=self.base.block_size,
            quant_type=QUANT_TYPES[self.base.quant],
        )
        if self.branch is None:
            return [frozen]
        return [frozen, *_branch_nodes(linear, self.branch.rows(rows.first, rows.count), data)]


def _branch_nodes(linear: Linear, branch: SideBranch, data: DataFile) -> list[onnx.NodeProto]:
    x, y = linear.node.input[0], linear.node.output[0]
    a = data.add(f"{linear.prefix}.lora_A", branch.a.T.cpu().numpy())
    b = data.add(f"{linear.prefix}.lora_B", branch.b.T.cpu().numpy())
    summed = y if branch.row_scale is None else f"{y}/summed"
    nodes = [
        node("MatMul", [x, a], f"{y}/lora_A"),
        node("MatMul", [f"{y}/lora_A", b], f"{y}/lora_B"),
        node("Add", [f"{y}/frozen", f"{y}/lora_B"], summed),
    ]
    if branch.row_scale is not None:
        scale = data.add(f"{linear.prefix}.row_scale", branch.row_scale.cpu().numpy())
        nodes.append(node("Mul", [summed, scale], y))
    return nodes


@torch.no_grad()
def coded_layers(model: nn.Module) -> dict[str, CodedLayer]:
    """The 4-bit layers of a tuned model by name, before it is merged.

    Raises:
        AdapterError: what an adapter adds to such a layer is no low-rank product.
    """
    found: dict[str, CodedLayer] = {}
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, AdaptedLinear) else module
        if isinstance(base, QuantizedLinear) and base.quant in QUANT_TYPES and not name.endswith(".base_layer"):
            found[name] = CodedLayer(base, module.branch() if isinstance(module, AdaptedLinear) else None)
    return found


def same_codes(graph: Path, layers: Mapping[str, CodedLayer]) -> int | None:
    """How many matrices of the graph on disk hold the very bytes of `layers`; None unless all of them do."""
    loaded = onnx.load(graph, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in loaded.initializer}
    shipped = [made for made in loaded.node if made.op_type == "MatMulBnb4"]
    lacking = set(layers)
    for made in shipped:
        name, first, count = made.name.split(SPLIT)
        trained = layers[name].stored(int(first), int(count))
        found = [read_tensor(tensors, graph.parent, tensor) for tensor in made.input[1:3]]
        if not all(np.array_equal(ours, theirs) for ours, theirs in zip(found, trained, strict=True)):
            return None
        lacking.discard(name)
    return None if lacking else len(shipped)
