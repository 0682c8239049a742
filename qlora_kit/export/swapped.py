"""Adapters as inputs of a graph, so that they are swapped at run time beside one base.

A and B of each adapted layer are inputs with a default of rank zero, which adds nothing: "no adapter" is the base. An
adapter is a file of these inputs in onnxruntime's own format (`onnxruntime.AdapterFormat`), which onnxruntime-genai
takes too. Ranks and layers may differ from adapter to adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from qlora_kit.adapters.layer import AdaptedLayer, AdaptedLinear, SideBranch
from qlora_kit.errors import ExportError
from qlora_kit.export.codes import Coded, CodedLayer
from qlora_kit.export.forms import Forms
from qlora_kit.export.linear import DataFile, Float, Form, Linear, node
from qlora_kit.export.parameters import MergedWeights, Rows

A, B = ".lora_A", ".lora_B"


class Swapped:
    """A layer in another form, with inputs for an adapter beside it.

    Attributes:
        places: of the layers that were written, by what their inputs' names begin with.
    """

    def __init__(self, form: Form, adapted: set[str], places: dict[str, Rows]) -> None:
        self.form, self.adapted, self.places = form, adapted, places

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """y = x Wᵀ + (x Aᵀ) Bᵀ; W alone where no adapter adapts the layer."""
        made = self.form.write(linear, weights, data)
        if linear.layer not in self.adapted:
            return made
        (self.places[linear.prefix],) = linear.rows
        nodes = [onnx.NodeProto.FromString(made.SerializeToString()) for made in made]
        x, y = linear.node.input[0], linear.node.output[0]
        nodes[-1].output[0] = f"{y}/frozen"
        inputs, outputs = _width(linear, weights)
        a = data.add(linear.prefix + A, np.zeros((inputs, 0), np.float32))
        b = data.add(linear.prefix + B, np.zeros((0, outputs), np.float32))
        return [
            *nodes,
            node("MatMul", [x, a], f"{y}/lora_A"),
            node("MatMul", [f"{y}/lora_A", b], f"{y}/lora_B"),
            node("Add", [f"{y}/frozen", f"{y}/lora_B"], y),
        ]


def _width(linear: Linear, weights: MergedWeights) -> tuple[int, int]:
    """(inputs, outputs) of a layer."""
    rows = linear.rows[0]
    return weights.read(Rows(rows.parameter, rows.first, 1)).shape[1], rows.count


def swapped_forms(coded: Mapping[str, CodedLayer], adapted: set[str], places: dict[str, Rows]) -> Forms:
    """The training base's codes where there are any, else the weights in fp32, with inputs beside `adapted` layers."""
    codes = Coded({name: CodedLayer(layer.base, None) for name, layer in coded.items()})

    def choose(linears: list[Linear], weights: MergedWeights) -> Mapping[str, Form]:
        return {linear.layer: Swapped(codes, adapted, places) for linear in linears if codes.all_of([linear])}

    return Forms(Swapped(Float(), adapted, places), choose, packs=lambda linears: False, shares_head=True)


def open_inputs(graph: Path) -> None:
    """Makes the tensors of rank zero inputs of the graph on disk, which they are the defaults of."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name.endswith((A, B)) and 0 in tensor.dims:
            shape = [size or f"rank of {tensor.name[: -len(A)]}" for size in tensor.dims]
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
    onnx.save(model, graph)


def side_branches(name: str, layers: Mapping[str, AdaptedLayer]) -> dict[str, SideBranch]:
    """What an adapter adds to each layer, by the layer's name.

    Raises:
        ExportError: a layer is not linear, or the adapter does more than add a low-rank product.
    """
    linear = {layer: module for layer, module in layers.items() if isinstance(module, AdaptedLinear)}
    if other := sorted(layers.keys() - linear.keys()):
        raise ExportError(f"adapter {name} adapts {other[0]}, and only linear layers have inputs for an adapter")
    found = {layer: module.branch() for layer, module in linear.items()}
    if any(branch.row_scale is not None for branch in found.values()):
        raise ExportError(
            f"adapter {name} scales rows of its base's weights, and cannot be swapped",
            got="DoRA",
            allowed="methods that only add to a layer's output: lora, adalora, sora",
            fix="Export it by itself: qlora-kit export",
        )
    return found


def write_adapter_file(path: Path, branches: Mapping[str, SideBranch], places: Mapping[str, Rows]) -> None:
    """Writes an adapter's A [in, rank] and B [rank, out], float32, its scaling in B, by the names of the inputs."""
    tensors: dict[str, onnxruntime.OrtValue] = {}
    for prefix, rows in places.items():
        if branch := branches.get(rows.layer):
            part = branch.rows(rows.first, rows.count)
            for name, matrix in ((A, part.a), (B, part.b)):
                array = np.ascontiguousarray(matrix.T.cpu().numpy())
                tensors[prefix + name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(tensors)
    path.parent.mkdir(parents=True)
    adapter.export_adapter(str(path))
