"""Linear layers of a decoder's graph, and the tensors that are written for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from qlora_kit.export.parameters import MergedWeights, Rows

PAGE, LINE = 4096, 64
"""What large and small tensors begin at a multiple of, in bytes: large ones may then be mapped as they are."""
INLINE_BYTES = 1024
"""Smaller tensors stay in the graph, where shape inference reads them."""
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """A MatMul whose weight [out, in] is rows of parameters, one under another (q, k and v may be one).

    Attributes:
        node: MatMul of x [batch, seq, in] and the weight, to y [batch, seq, out].
    """

    node: onnx.NodeProto
    rows: tuple[Rows, ...]

    @property
    def layer(self) -> str:
        """Name of the layer, the first of several."""
        return self.rows[0].layer

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return self.node.input[1].removesuffix(".weight")

    def weight(self, weights: MergedWeights) -> Tensor:
        """float32 [out, in], read now."""
        parts = [weights.read(rows) for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Tensors(ABC):
    """Where the tensors of a graph go.

    Attributes:
        casts: nodes that make fp32 of what is stored in fp16; they stand before all others.
    """

    def __init__(self) -> None:
        self.casts: list[onnx.NodeProto] = []

    @abstractmethod
    def add(self, name: str, array: np.ndarray) -> str:
        """Stores `array`; returns `name`."""

    def add_half(self, name: str, array: np.ndarray) -> str:
        """Stores `array`, whose numbers are fp16's, in half the bytes; `name` is fp32 again, by a node of `casts`."""
        stored = self.add(f"{name}_fp16", array.astype(np.float16))
        self.casts.append(node("Cast", [stored], name, to=onnx.TensorProto.FLOAT))
        return name


class GraphTensors(Tensors):
    """The initializers of a graph in memory."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__()
        self._graph = graph

    def add(self, name: str, array: np.ndarray) -> str:
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name


class DataFile(Tensors):
    """The file beside a graph that holds its weights, written tensor by tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, array: np.ndarray) -> str:
        if array.nbytes < INLINE_BYTES:
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
            return name
        step = PAGE if array.nbytes >= 1 << 20 else LINE
        self._file.write(bytes(-self._file.tell() % step))
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location="EXTERNAL")
        place = {"location": self.path.name, "offset": self._file.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        np.ascontiguousarray(array).tofile(self._file)
        self.tensors[name] = tensor
        return name

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Form(Protocol):
    """How a linear layer is stored."""

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """Writes the layer's tensors into `data`; returns the nodes that take the place of its MatMul."""


class Float:
    """The weight itself, float32."""

    def write(self, linear: Linear, weights: MergedWeights, data: DataFile) -> list[onnx.NodeProto]:
        """The MatMul as it is; its weight is written with all that other nodes may share."""
        return [linear.node]


def read_tensor(tensors: Mapping[str, onnx.TensorProto], folder: Path, name: str) -> np.ndarray:
    """The tensor `name` of a graph in `folder`, from where it is stored."""
    array: np.ndarray = numpy_helper.to_array(tensors[name], base_dir=str(folder))
    return array


def node(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node called as its output is."""
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", domain=domain, **attributes)
