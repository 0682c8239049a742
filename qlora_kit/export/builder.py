"""Runs onnxruntime-genai's model builder: `python -m qlora_kit.export.builder MERGED TARGET FACTORS [KEY=VALUE …]`.

It writes a graph whose matrices name the parameter that they are, and no weights: those are written by
`export/weights.py`. A process of its own, because the builder prints every layer and is changed here where it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from onnxruntime_genai.models import builder
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.export.parameters import Factors, MergedWeights, multiplied, parameter_location, read_factors


class Places:
    """Where in memory each parameter lies, so that a view of one is known for what it is."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, str]] = []
        self.views: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self.ranges.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name))

    def external(self, name: str) -> ir.ExternalTensor | None:
        """The initializer `name` as whole rows of a parameter, or their transpose; None where it is neither."""
        view = self.views.get(name)
        if view is None or view.dim() != 2 or view.dtype != torch.float32:
            return None
        rows = view.T if view.T.is_contiguous() else view
        owner = next(((low, name) for low, high, name in self.ranges if low <= rows.data_ptr() < high), None)
        if owner is None or not rows.is_contiguous():
            return None
        return ir.ExternalTensor(
            parameter_location(owner[1], transposed=rows is not view),
            rows.data_ptr() - owner[0],
            rows.nbytes,
            ir.DataType.FLOAT,
            shape=ir.Shape(view.shape),
            name=name,
        )


def load_mapped(folder: str, places: Places, factors: Factors) -> PreTrainedModel:
    """The model in `folder` with its weights mapped from disk: the pages that are read may be dropped again.

    Matrices take their factors when they are written; norms and biases, which the graph holds, take them here.
    """
    config = builder.AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    weights: dict[str, Tensor] = {}
    for file in MergedWeights(Path(folder)).files():
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    weights |= {name: multiplied(name, weights[name], factors) for name in factors if weights[name].ndim == 1}
    found = model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    if lacking := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"its files lack {lacking[0]}" + (f", hold {found.unexpected_keys[:1]}"))
    for name, tensor in weights.items():
        places.add(name, tensor)
    return model


def main(merged: str, target: str, factors: str, *options: str) -> None:
    """Writes graph and configuration of the Hugging Face folder `merged`, fp32, into `target`."""
    places, multipliers = Places(), read_factors(Path(factors))
    model_class: Any = builder.Model

    def make_initializer(self: Any, tensor: Any, /, name: str, **kwargs: Any) -> None:
        if isinstance(tensor, Tensor):
            places.views[name] = tensor.detach()
        stock(self, tensor, name, **kwargs)

    def save_model(self: Any, out_dir: str) -> None:
        self.model.graph.sort()
        for name, value in self.model.graph.initializers.items():
            tensor = places.external(name) or value.const_value
            value.const_value = tensor if isinstance(tensor, ir.ExternalTensor) else _in_memory(tensor, name)
        ir.save(self.model, Path(out_dir) / self.filename)

    stock = model_class.make_initializer
    model_class.make_initializer, model_class.save_model = make_initializer, save_model
    loader: Any = AutoModelForCausalLM
    loader.from_pretrained = lambda folder, **_: load_mapped(folder, places, multipliers)
    place = ("", merged, target, "fp32", "cpu", f"{target}/.cache")
    builder.create_model(*place, **builder.parse_extra_options(*place, list(options)))


def _in_memory(tensor: ir.TensorProtocol, name: str) -> ir.Tensor:
    return ir.Tensor(tensor.numpy(), name=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
