"""The training base's own 4-bit codes in a graph, with the adapter as a float branch beside them.

com.microsoft.MatMulBnb4 takes the bytes that bitsandbytes made as they are. It wants one float32 absmax a block, so
nested statistics are expanded, in fp32 as training's reference does. com.microsoft.MatMulNBits takes those of an int4
base: codes, float32 scales and integer zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
CODED_BASES = {"nf4": tuple(QUANT_TYPES), "int4_exact": ("int4",)}
"""The profiles that ship the training base's codes to the base.quant that they are for."""
EXACT_LEVEL = 0
"""MatMulNBits' accuracy level that rounds no activations."""
SPLIT = ":"


@dataclass(frozen=True)
class CodedLayer:
    """A frozen 4-bit layer, and what an adapter adds to its output."""

    base: QuantizedLinear
    branch: SideBranch | None

    def stored(self, first: int, count: int) -> dict[str, np.ndarray]:
        """What the operator takes of `count` rows, in its order, each with the ending of its name.

        Of nf4 and fp4: codes uint8 [count · in / 2], the even one in the high half of a byte, and float32 absmax. Of
        int4 those rows of `Int4Blocks`.

        Raises:
            ExportError: the rows begin inside a block.
        """
        if self.base.quant == "int4":
            rows = slice(first, first + count)
            blocks = self.base.int4_blocks._asdict()
            return {name: tensor[rows].cpu().numpy() for name, tensor in blocks.items()}
        return self._stored_bnb(first, count)

    def _stored_bnb(self, first: int, count: int) -> dict[str, np.ndarray]:
        start, size = first * self.base.in_features, count * self.base.in_features
        if start % self.base.block_size:
            raise ExportError(
                f"rows that begin at {first} of a layer begin inside a block of {self.base.block_size} codes",
                fix="Export int8 or fp32",
            )
        codes = self.base.codes.view(torch.uint8).flatten()[start // 2 : (start + size + 1) // 2]
        blocks = slice(start // self.base.block_size, -(-(start + size) // self.base.block_size))
        return {"codes": codes.cpu().numpy(), "absmax": self.base.expanded_absmax()[blocks].cpu().numpy()}

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """y = scale · (x Wᵀ + (x Aᵀ) Bᵀ), of which the adapter has what it has."""
        x, y = linear.node.input[0], linear.node.output[0]
        (rows,) = linear.rows
        stored = self.stored(rows.first, rows.count)
        tensors = [data.add(f"{linear.prefix}.weight_{name}", array) for name, array in stored.items()]
        kind, attributes = self._operator()
        frozen = onnx.helper.make_node(
            kind,
            [x, *tensors],
            [y if self.branch is None else f"{y}/frozen"],
            name=f"{rows.layer}{SPLIT}{rows.first}{SPLIT}{rows.count}",  # whose codes they are, for `same_codes`
            domain=MICROSOFT,
            K=self.base.in_features,
            N=rows.count,
            block_size=self.base.block_size,
            **attributes,
        )
        if self.branch is None:
            return [frozen]
        return [frozen, *_branch_nodes(linear, self.branch.rows(rows.first, rows.count), data)]

    def _operator(self) -> tuple[str, dict[str, Any]]:
        """The operator that computes with the codes, and its attributes beyond shapes."""
        if self.base.quant == "int4":
            return "MatMulNBits", {"bits": 4, "accuracy_level": EXACT_LEVEL}
        return "MatMulBnb4", {"quant_type": QUANT_TYPES[self.base.quant]}


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
    coded = {quant for quants in CODED_BASES.values() for quant in quants}
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, AdaptedLinear) else module
        if isinstance(base, QuantizedLinear) and base.quant in coded and not name.endswith(".base_layer"):
            found[name] = CodedLayer(base, module.branch() if isinstance(module, AdaptedLinear) else None)
    return found


def same_codes(graph: Path, layers: Mapping[str, CodedLayer]) -> int | None:
    """How many matrices of the graph on disk hold the very bytes of `layers`; None unless all of them do."""
    loaded = onnx.load(graph, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in loaded.initializer}
    shipped = [made for made in loaded.node if made.op_type in ("MatMulBnb4", "MatMulNBits")]
    lacking = set(layers)
    for made in shipped:
        name, first, count = made.name.split(SPLIT)
        trained = layers[name].stored(int(first), int(count))
        found = [read_tensor(tensors, graph.parent, tensor) for tensor in made.input[1:]]
        if not all(np.array_equal(ours, theirs) for ours, theirs in zip(found, trained.values(), strict=True)):
            return None
        lacking.discard(name)
    return None if lacking else len(shipped)
