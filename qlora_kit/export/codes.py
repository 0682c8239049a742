"""The training base's own 4-bit codes in a graph, with the adapter as a float branch beside them.

com.microsoft.MatMulBnb4 takes the bytes that bitsandbytes made as they are. It wants one float32 absmax a block, so
nested statistics are expanded, in fp32 as training's reference does. com.microsoft.MatMulNBits takes those of an int4
base: codes, float32 scales and integer zero points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from qlora_kit.adapters.layer import AdaptedLinear, SideBranch
from qlora_kit.errors import ExportError
from qlora_kit.export.linear import MICROSOFT, DataFile, Linear, read_tensor
from qlora_kit.export.parameters import MergedWeights, Rows
from qlora_kit.export.side_branch import branch_nodes, stacked
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import coded_head

QUANT_TYPES = {"fp4": 0, "nf4": 1}
"""bitsandbytes' names to MatMulBnb4's attribute."""
CODED_BASES = {"nf4": tuple(QUANT_TYPES), "int4_exact": ("int4",), "int4_fast": ("int4",)}
"""The profiles that ship the training base's codes to the base.quant that they are for."""
EXACT_LEVEL, FAST_LEVEL = 0, 4
"""MatMulNBits' accuracy levels that round no activations, and round them to 8 bit in blocks."""
SPLIT, BETWEEN = ":", ","


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


@dataclass(frozen=True)
class Coded:
    """Layers in the codes that they were trained on, each with its adapter's branch. Those of one product have one.

    Attributes:
        layers: by name.
        level: MatMulNBits' accuracy level, of int4 bases.
    """

    layers: Mapping[str, CodedLayer]
    level: int = EXACT_LEVEL

    def all_of(self, linears: Sequence[Linear]) -> bool:
        """Whether all of them have codes."""
        return all(rows.layer in self.layers for linear in linears for rows in linear.rows)

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """y = row_scale · (x Wᵀ + (x Aᵀ) Bᵀ), of which the adapter has what it has."""
        x, y = linear.node.input[0], linear.node.output[0]
        tensors = [
            data.add(f"{linear.prefix}.weight_{name}", array)
            for name, array in _stored(self.layers, linear.rows).items()
        ]
        parts = [self.layers[rows.layer] for rows in linear.rows]
        kind, attributes = _operator(parts[0].base, self.level)
        branches = [part.branch and part.branch.rows(rows.first, rows.count) for part, rows in zip(parts, linear.rows)]
        branch = stacked(branches, [rows.count for rows in linear.rows])
        frozen = onnx.helper.make_node(
            kind,
            [x, *tensors],
            [y if branch is None else f"{y}/frozen"],
            name=_name(linear.rows),
            domain=MICROSOFT,
            K=parts[0].base.in_features,
            N=sum(rows.count for rows in linear.rows),
            block_size=parts[0].base.block_size,
            **attributes,
        )
        return [frozen] if branch is None else [frozen, *branch_nodes(linear, frozen.output[0], branch, data)]


def _stored(layers: Mapping[str, CodedLayer], rows: Sequence[Rows]) -> dict[str, np.ndarray]:
    """What the operator takes of all these rows, one behind another."""
    parts = [layers[of.layer].stored(of.first, of.count) for of in rows]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _operator(base: QuantizedLinear, level: int) -> tuple[str, dict[str, Any]]:
    """The operator that computes with the codes, and its attributes beyond shapes."""
    if base.quant == "int4":
        return "MatMulNBits", {"bits": 4, "accuracy_level": level}
    return "MatMulBnb4", {"quant_type": QUANT_TYPES[base.quant]}


def _name(rows: Sequence[Rows]) -> str:
    """A node's name, which tells `same_codes` whose codes it has."""
    return BETWEEN.join(f"{of.parameter}{SPLIT}{of.first}{SPLIT}{of.count}" for of in rows)


def _rows(name: str) -> list[Rows]:
    """Those that `_name` was given."""
    parts = [part.split(SPLIT) for part in name.split(BETWEEN)]
    return [Rows(parameter, int(first), int(count)) for parameter, first, count in parts]


@torch.no_grad()
def coded_layers(model: nn.Module) -> dict[str, CodedLayer]:
    """The 4-bit layers of a tuned model by name, before it is merged; its head ships expanded, whatever holds it.

    Raises:
        AdapterError: what an adapter adds to such a layer is no low-rank product.
    """
    found: dict[str, CodedLayer] = {}
    head = coded_head(model)
    coded = {quant for quants in CODED_BASES.values() for quant in quants}
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, AdaptedLinear) else module
        if base is head or name.endswith(".base_layer"):
            continue
        if isinstance(base, QuantizedLinear) and base.quant in coded:
            found[name] = CodedLayer(base, module.branch() if isinstance(module, AdaptedLinear) else None)
    return found


def same_codes(graph: Path, layers: Mapping[str, CodedLayer]) -> int | None:
    """How many matrices of the graph on disk hold the very bytes of `layers`; None unless all of them do."""
    loaded = onnx.load(graph, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in loaded.initializer}
    shipped = [made for made in loaded.node if made.op_type in ("MatMulBnb4", "MatMulNBits") and SPLIT in made.name]
    lacking = set(layers)
    for made in shipped:
        rows = _rows(made.name)
        trained = _stored(layers, rows)
        found = [read_tensor(tensors, graph.parent, tensor) for tensor in made.input[1:]]
        if not all(np.array_equal(ours, theirs) for ours, theirs in zip(found, trained.values(), strict=True)):
            return None
        lacking -= {of.layer for of in rows}
    return None if lacking else sum(len(_rows(made.name)) for made in shipped)
