"""Parameters of a merged model's folder, read one at a time, and how a graph without weights names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STRAIGHT, TRANSPOSED = "parameter:", "transposed:"

Factors = Mapping[str, Sequence[Tensor]]
"""Parameter to what it is multiplied by: [in] by columns, [out, 1] by rows; [channels] where it has one dimension."""


def multiplied(name: str, tensor: Tensor, factors: Factors, first: int = 0) -> Tensor:
    """The parameter `name`, or its rows from `first` on, times its factors."""
    for factor in factors.get(name, ()):
        by_rows = factor.ndim == tensor.ndim
        tensor = tensor * (factor[first : first + len(tensor)] if by_rows else factor)
    return tensor


def multiply_parameters(model: nn.Module, factors: Factors | None) -> None:
    """Multiplies a model's parameters by their factors, in place."""
    for name, parameter in model.named_parameters():
        parameter.data = multiplied(name, parameter.data, factors or {})


def write_factors(factors: Factors, file: Path) -> None:
    """Writes `factors` where another process reads them."""
    save_file({f"{k} {name}": factor.clone() for name, of in factors.items() for k, factor in enumerate(of)}, file)


def read_factors(file: Path) -> Factors:
    """What `write_factors` wrote; none where it wrote nothing."""
    found: dict[str, list[Tensor]] = {}
    for key, factor in sorted(load_file(file).items()) if file.exists() else ():
        found.setdefault(key.partition(" ")[2], []).append(factor)
    return found


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `first + count` of the matrix `parameter` [out, in]."""

    parameter: str
    first: int
    count: int

    @property
    def layer(self) -> str:
        """Name of the layer whose weight it is."""
        return self.parameter.removesuffix(".weight")


def parameter_location(parameter: str, transposed: bool) -> str:
    """What stands for the file's name in a tensor of the builder's graph that is a parameter."""
    return (TRANSPOSED if transposed else STRAIGHT) + parameter


def rows_of(tensor: onnx.TensorProto) -> tuple[Rows, bool] | None:
    """The rows that an initializer of the builder's graph is, and whether transposed; None where it has its data."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    transposed = entries["location"].startswith(TRANSPOSED)
    in_features, count = tensor.dims if transposed else tensor.dims[::-1]
    parameter = entries["location"].partition(":")[2]
    return Rows(parameter, int(entries["offset"]) // (4 * in_features), count), transposed


class MergedWeights:
    """The safetensors files of a Hugging Face folder.

    Args:
        factors: what parameters are multiplied by as they are read.
    """

    def __init__(self, folder: Path, factors: Factors | None = None) -> None:
        self.folder, self.factors = folder, factors or {}
        index = folder / "model.safetensors.index.json"
        self._map: dict[str, str] | None = None
        if index.exists():
            self._map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def files(self) -> list[Path]:
        """All of them."""
        names = sorted(set(self._map.values())) if self._map else ["model.safetensors"]
        return [self.folder / name for name in names]

    def read(self, rows: Rows) -> Tensor:
        """float32 [count, in], read from disk now."""
        name = self._map[rows.parameter] if self._map else "model.safetensors"
        opened: Any
        with safe_open(self.folder / name, framework="pt") as opened:
            found = opened.get_slice(rows.parameter)[rows.first : rows.first + rows.count].to(torch.float32)
        return multiplied(rows.parameter, found, self.factors, rows.first)
