"""Adapters as inputs of a graph, so that they are swapped at run time beside one base.

A and B of each adapted product are inputs with a default of rank zero, which adds nothing: "no adapter" is the base.
Where an adapter scales the rows of layers (DoRA), these factors are an input too, with a default of one. An adapter is
a file of these inputs in onnxruntime's own format (`onnxruntime.AdapterFormat`), which onnxruntime-genai takes too.
Ranks and layers may differ from adapter to adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from qlora_kit.adapters.layer import AdaptedLayer, AdaptedLinear, SideBranch
from qlora_kit.errors import ExportError
from qlora_kit.export.codes import Coded, CodedLayer
from qlora_kit.export.forms import Forms
from qlora_kit.export.linear import DataFile, Float, Form, Linear
from qlora_kit.export.parameters import MergedWeights, Rows
from qlora_kit.export.side_branch import branch_nodes, stacked

A, B, SCALE = ".lora_A", ".lora_B", ".row_scale"

OPERATOR_FLOATS = 16384
"""About as many float32 are read in the time that an operator takes at one token, measured on SmolLM2: 5 µs."""
SAVED_OPERATORS = 4
"""A layer's product and its branch, which a layer before it does too."""

Places = dict[str, tuple[Rows, ...]]
"""What the names of a product's inputs begin with, to the rows of layers that it computes."""


class Adapted(NamedTuple):
    """What the adapters of a bundle do to a layer: the highest of their ranks, and whether one scales its rows."""

    rank: int
    scaled: bool


class Swapped:
    """A layer in another form, with inputs for an adapter beside it; layers of one product have one A and one B.

    Attributes:
        adapted: layers that an adapter adapts, by name.
        places: of the products that were written.
    """

    def __init__(self, form: Form, adapted: Mapping[str, Adapted], places: Places) -> None:
        self.form, self.adapted, self.places = form, adapted, places

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """y = row_scale · (x Wᵀ + (x Aᵀ) Bᵀ); W alone where no adapter adapts the layer."""
        made = self.form.write(linear, weights, data)
        scaled = [self.adapted[rows.layer].scaled for rows in linear.rows if rows.layer in self.adapted]
        if not scaled:
            return made
        self.places[linear.prefix] = linear.rows
        nodes = [onnx.NodeProto.FromString(made.SerializeToString()) for made in made]
        frozen = nodes[-1].output[0] = f"{linear.node.output[0]}/frozen"
        first, outputs = linear.rows[0], sum(rows.count for rows in linear.rows)
        inputs = weights.read(Rows(first.parameter, first.first, 1)).shape[1]
        nothing = SideBranch(
            torch.zeros(0, inputs), torch.zeros(outputs, 0), torch.ones(outputs) if any(scaled) else None
        )
        return [*nodes, *branch_nodes(linear, frozen, nothing, data)]


def swapped_forms(coded: Mapping[str, CodedLayer], adapted: Mapping[str, Adapted], places: Places) -> Forms:
    """The training base's codes where there are any, else the weights in fp32, with inputs beside `adapted` layers.

    Layers of one input are one product where that saves time: it saves operators, but B then holds zeros to be read.
    MatMulBnb4's codes stay apart.
    """
    codes = Coded({name: CodedLayer(layer.base, None) for name, layer in coded.items()})

    def choose(linears: list[Linear], weights: MergedWeights) -> Mapping[str, Form]:
        return {linear.layer: Swapped(codes, adapted, places) for linear in linears if codes.all_of([linear])}

    def packs(linears: list[Linear]) -> bool:
        parts = [rows for linear in linears for rows in linear.rows]
        layers = [coded.get(rows.layer) for rows in parts]
        ranks = [adapted[rows.layer].rank if rows.layer in adapted else 0 for rows in parts]
        outputs = [rows.count for rows in parts]
        zeros = sum(ranks) * sum(outputs) - sum(rank * count for rank, count in zip(ranks, outputs, strict=True))
        saves = zeros <= (len(parts) - 1) * SAVED_OPERATORS * OPERATOR_FLOATS
        return saves and {layer.base.quant if layer else None for layer in layers} in ({None}, {"int4"})

    return Forms(Swapped(Float(), adapted, places), choose, packs=packs, packs_all=True, shares_head=True)


def open_inputs(graph: Path, places: Places) -> None:
    """Makes the tensors of adapters inputs of the graph on disk, which they are the defaults of."""
    model = onnx.load(graph, load_external_data=False)
    names = {prefix + ending for prefix in places for ending in (A, B, SCALE)}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            shape = [size or f"rank of {tensor.name[: -len(A)]}" for size in tensor.dims]
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
    onnx.save(model, graph)


def side_branches(name: str, layers: Mapping[str, AdaptedLayer]) -> dict[str, SideBranch]:
    """What an adapter adds to each layer, by the layer's name.

    Raises:
        ExportError: a layer is not linear.
    """
    linear = {layer: module for layer, module in layers.items() if isinstance(module, AdaptedLinear)}
    if other := sorted(layers.keys() - linear.keys()):
        raise ExportError(f"adapter {name} adapts {other[0]}, and only linear layers have inputs for an adapter")
    return {layer: module.branch() for layer, module in linear.items()}


def write_adapter_file(path: Path, branches: Mapping[str, SideBranch], places: Places) -> None:
    """Writes an adapter's inputs by name, float32: A [in, rank], B [rank, out] with its scaling in it, row_scale [out].

    Products of several layers have the ranks of all in one A, and B's blocks along its diagonal.
    """
    tensors: dict[str, onnxruntime.OrtValue] = {}
    for prefix, rows in places.items():
        parts = [branches[of.layer].rows(of.first, of.count) if of.layer in branches else None for of in rows]
        if branch := stacked(parts, [of.count for of in rows]):
            for name, matrix in ((A, branch.a.T), (B, branch.b.T), (SCALE, branch.row_scale)):
                if matrix is not None:
                    array = np.ascontiguousarray(matrix.cpu().numpy())
                    tensors[prefix + name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(tensors)
    path.parent.mkdir(parents=True)
    adapter.export_adapter(str(path))
