"""Writes a decoder's graph with weights of ours: each linear layer in the form that a profile gives it.

Tensors are read from the merged model, changed and written one at a time: no copy of the model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from qlora_kit.export.forms import Forms
from qlora_kit.export.linear import DataFile, Linear
from qlora_kit.export.nbits import BLOCK_SIZE, embedding_nodes, lookup_nodes
from qlora_kit.export.parameters import MergedWeights, Rows, rows_of

MayPack = Callable[[list[Linear]], bool]


@dataclass(frozen=True)
class Parameter:
    """An initializer that is rows of the merged model's parameters."""

    rows: tuple[Rows, ...]
    transposed: bool


class DecoderGraph:
    """The builder's graph, whose matrices name parameters of `weights`."""

    def __init__(self, built: Path, weights: MergedWeights) -> None:
        self.model, self.weights = onnx.load(built, load_external_data=False), weights
        self.parameters: dict[str, Parameter] = {}
        self.held: dict[str, onnx.TensorProto] = {}
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for tensor in self._tensors.values():
            if found := rows_of(tensor):
                self.parameters[tensor.name] = Parameter((found[0],), found[1])
            else:
                self.held[tensor.name] = tensor

    def linear(self, node: onnx.NodeProto) -> Linear | None:
        """The linear layer that `node` is."""
        weight = self.parameters.get(node.input[1]) if node.op_type == "MatMul" else None
        return Linear(node, weight.rows) if weight and weight.transposed else None

    def linears(self) -> list[Linear]:
        """All linear layers, in the order of the graph."""
        return [linear for node in self.model.graph.node if (linear := self.linear(node))]

    def pack_attention(self, may: MayPack) -> None:
        """Makes q, k and v of each layer one product, in place, where attention takes them so and they share x."""
        makers = {name: node for node in self.model.graph.node for name in node.output}
        packed: dict[str, list[onnx.NodeProto]] = {}  # name of the first node to what takes its place
        gone: set[str] = set()
        for attention in self.model.graph.node:
            if attention.op_type != "GroupQueryAttention" or not all(attention.input[:3]):
                continue
            adds = [makers[name] for name in attention.input[:3]]
            biased = all(node.op_type == "Add" and node.input[1] in self.held for node in adds)
            products = [makers[node.input[0]] for node in adds] if biased else adds
            linears = [linear for node in products if (linear := self.linear(node))]
            if len(linears) < len(products) or len({node.input[0] for node in products}) > 1 or not may(linears):
                continue
            nodes = self._packed(products, adds if biased else [])
            gone |= {node.name for node in (*products, *adds)}
            packed[products[0].name] = nodes
            attention.input[0], attention.input[1], attention.input[2] = nodes[-1].output[0], "", ""
        nodes = [new for node in self.model.graph.node for new in packed.get(node.name, [node])]
        self._replace_nodes([node for node in nodes if node.name not in gone])

    def pack_others(self, may: MayPack) -> None:
        """Makes all layers of one input one product that is split again, in place."""
        by_input: dict[str, list[Linear]] = {}
        for linear in self.linears():
            by_input.setdefault(linear.node.input[0], []).append(linear)
        groups = {group[0].node.name: group for group in by_input.values() if len(group) > 1 and may(group)}
        gone = {linear.node.name for group in groups.values() for linear in group[1:]}
        nodes = [
            new
            for node in self.model.graph.node
            if node.name not in gone
            for new in (self._split(groups[node.name]) if node.name in groups else [node])
        ]
        self._replace_nodes(nodes)

    def _split(self, group: list[Linear]) -> list[onnx.NodeProto]:
        """One MatMul for the group's, and its output in their parts."""
        first, rows = group[0].node, tuple(rows for linear in group for rows in linear.rows)
        weight, y = f"{first.input[1]}.packed", f"{first.output[0]}/packed"
        self.parameters[weight] = Parameter(rows, transposed=True)
        counts = np.array([sum(rows.count for rows in linear.rows) for linear in group])
        self.held[f"{weight}_counts"] = numpy_helper.from_array(counts, f"{weight}_counts")
        outputs = [linear.node.output[0] for linear in group]
        return [
            onnx.helper.make_node("MatMul", [first.input[0], weight], [y], name=f"{first.name}/packed"),
            onnx.helper.make_node("Split", [y, f"{weight}_counts"], outputs, name=f"{first.name}/split", axis=-1),
        ]

    def _packed(self, products: list[onnx.NodeProto], adds: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """One MatMul, and an Add where there are biases, for those of q, k and v."""

        def renamed(text: str) -> str:
            return text.replace("q_proj", "qkv_proj")

        def merged(node: onnx.NodeProto, x: str) -> onnx.NodeProto:
            inputs, output = [x, renamed(node.input[1])], renamed(node.output[0])
            return onnx.helper.make_node(node.op_type, inputs, [output], name=renamed(node.name))

        rows = tuple(row for node in products for row in self.parameters[node.input[1]].rows)
        nodes = [merged(products[0], products[0].input[0])]
        self.parameters[nodes[0].input[1]] = Parameter(rows, transposed=True)
        if adds:
            nodes.append(merged(adds[0], nodes[0].output[0]))
            bias = np.concatenate([numpy_helper.to_array(self.held[node.input[1]]) for node in adds])
            self.held[nodes[1].input[1]] = numpy_helper.from_array(bias, nodes[1].input[1])
        return nodes

    def write(self, target: Path, forms: Forms) -> None:
        """Writes the graph to `target` and its weights beside it, into a file called TARGET_data."""
        linears = self.linears()
        chosen = forms.choose(linears, self.weights)
        heads = {linear.rows: linear for linear in linears}
        with DataFile(target.with_name(f"{target.name}_data")) as data:
            nodes: list[onnx.NodeProto] = []
            for node in self.model.graph.node:
                if linear := self.linear(node):
                    nodes += chosen.get(linear.layer, forms.other).write(linear, self.weights, data)
                else:
                    nodes += self._looked_up(node, heads, data) if forms.embeds_codes else [node]
            nodes = [*data.casts, *nodes]
            for name in dict.fromkeys(name for node in nodes for name in node.input):
                if name in self.held:
                    data.add(name, numpy_helper.to_array(self.held[name]))
                elif name in self.parameters:
                    data.add(name, self._array(self.parameters[name]))
        self._replace_nodes(nodes)
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(data.tensors.values())
        onnx.save(self.model, target)

    def _looked_up(
        self, node: onnx.NodeProto, heads: dict[tuple[Rows, ...], Linear], data: DataFile
    ) -> list[onnx.NodeProto]:
        """The node; of an embedding what reads 8-bit codes, those of the one of `heads` that it is."""
        table = self.parameters.get(node.input[0]) if node.op_type == "Gather" else None
        in_features = self._tensors[node.input[0]].dims[1] if table else 0
        if table is None or in_features % BLOCK_SIZE:
            return [node]
        if head := heads.get(table.rows):
            return lookup_nodes(node, head, in_features, data)
        return embedding_nodes(node, self.weights.read(table.rows[0]), data)

    def _array(self, parameter: Parameter) -> np.ndarray:
        parts = [self.weights.read(rows) for rows in parameter.rows]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        array: np.ndarray = (weight.T if parameter.transposed else weight).numpy()
        return array

    def _replace_nodes(self, nodes: list[onnx.NodeProto]) -> None:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
