"""Graphs of tasks: a merged transformers model through torch's exporter, laid out as a bundle."""

from __future__ import annotations

import inspect
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.errors import ExportError
from qlora_kit.export.graph import GRAPH
from qlora_kit.export.linear import GraphTensors
from qlora_kit.export.nbits import embedding_nodes
from qlora_kit.export.parameters import Factors, multiply_parameters

OPSET = 20
BLOCK_SIZE = 32  # channels of an int8 weight that share a scale
INSIDE_BYTES = 64 * 2**20  # weights of less stay inside the graph's file
LARGE_TABLE = 2**20  # weights of an embedding that is worth rounding
QUANTIZED_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: inputs are rounded to int8 too
TYPES = "token_type_ids"


class _Positional(nn.Module):
    """The model with its inputs by place and its outputs by name."""

    def __init__(self, model: PreTrainedModel, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors)), return_dict=True)
        return tuple(getattr(found, name) for name in self.outputs)


def build_task_graph(
    merged: Path,
    target: Path,
    profile: str,
    auto_class: str,
    tokenizer: PreTrainedTokenizerBase,
    factors: Factors | None = None,
) -> None:
    """Writes graph, weights and configuration of the merged model `merged` into the folder `target`.

    Inputs: input_ids, attention_mask and, where the model tells two texts apart, token_type_ids: int64 [batch, seq].
    Outputs: float32 logits [batch, labels] or [batch, seq, labels]; or start_logits and end_logits [batch, seq].

    Args:
        profile: fp32, or int8 (blocks of 32, MatMulNBits; small embeddings, poolers and heads stay fp32).
        auto_class: the Auto class of transformers that reads `merged`.
        factors: what parameters are multiplied by.

    Raises:
        ExportError: torch cannot export this model.
    """
    model = getattr(transformers, auto_class).from_pretrained(merged, dtype=torch.float32).eval()
    multiply_parameters(model, factors)
    graph = _exported(model, input_names(model, tokenizer), output_names(auto_class))
    write_graph(quantized(graph) if profile == "int8" else graph, target / GRAPH)
    copy_configuration(merged, target)


def copy_configuration(merged: Path, target: Path) -> None:
    """What a bundle says of its model beside the graph."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(merged / name, target / name)


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The inputs that the model is trained with."""
    takes_types = TYPES in inspect.signature(type(model).forward).parameters
    return ["input_ids", "attention_mask", *([TYPES] if takes_types and TYPES in tokenizer.model_input_names else [])]


def output_names(auto_class: str) -> list[str]:
    """What the model of a task answers with."""
    return ["start_logits", "end_logits"] if auto_class == "AutoModelForQuestionAnswering" else ["logits"]


def _exported(model: PreTrainedModel, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    ids = torch.full((2, 5), 3)  # no size that the graph could take for a constant
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    examples = {"input_ids": ids, "attention_mask": mask, TYPES: torch.zeros_like(ids)}
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    module, given = _Positional(model, inputs, outputs), tuple(examples[name] for name in inputs)
    return exported(module, given, inputs, outputs, (tuple(dynamic for _ in inputs),), type(model).__name__)


def exported(
    module: nn.Module,
    examples: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: tuple[Any, ...],
    name: str,
) -> onnx.ModelProto:
    """The graph of `module`, with the inputs and outputs so named.

    Args:
        examples: its arguments, tensors or tuples of tensors.
        dynamic: of each argument, the dimensions of any size.
        name: of the model, for errors.

    Raises:
        ExportError: torch cannot export it.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                examples,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ExportError(
            f"{name} could not be written as an ONNX graph ({reason})", fix="Use the merged model"
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantizer report each step, and the quantizer's import sets up logging for the whole process."""
    root, disabled = logging.root, logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def quantized(graph: onnx.ModelProto, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """Weights of matrix products and tables in 8 bit, those of the head aside (a pooler is a Gemm, and stays as it is).

    Args:
        outputs: those that a head makes; all where left out.
    """
    found = round_products(graph, _heads(graph.graph, outputs))
    round_tables(found.graph)
    return found


def round_products(graph: onnx.ModelProto, kept: Sequence[str] = ()) -> onnx.ModelProto:
    """Weights of matrix products in 8 bit, those of the nodes `kept` aside."""
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            graph,
            bits=8,
            block_size=BLOCK_SIZE,
            is_symmetric=False,  # zero points halve what rounding of weights costs, and cost no time
            accuracy_level=QUANTIZED_ACTIVATIONS,
            nodes_to_exclude=list(kept),
        )
        quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found


def round_tables(graph: onnx.GraphProto) -> None:
    """Makes 8-bit codes of each large embedding that is nothing else."""
    tables = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes: list[onnx.NodeProto] = []
    data = GraphTensors(graph)
    for made in graph.node:
        table = tables.get(made.input[0]) if made.op_type == "Gather" and readers[made.input[0]] == 1 else None
        if table is None or len(table.dims) != 2 or table.dims[1] % BLOCK_SIZE or prod(table.dims) < LARGE_TABLE:
            nodes.append(made)
            continue
        nodes += embedding_nodes(made, torch.from_numpy(numpy_helper.to_array(table).copy()), data)
        graph.initializer.remove(table)
    del graph.node[:]
    graph.node.extend([*data.casts, *nodes])


def _heads(graph: onnx.GraphProto, outputs: Sequence[str] | None) -> list[str]:
    """Names of the products with a weight that no other such product follows on the way to an output."""
    weights = {tensor.name for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    waiting = [value.name for value in graph.output if outputs is None or value.name in outputs]
    seen, heads = set[str](), []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in maker:
            continue
        seen.add(name)
        node = maker[name]
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            heads.append(node.name)
        else:
            waiting += node.input
    return heads


def write_graph(graph: onnx.ModelProto, file: Path) -> None:
    """The graph, with the weights of a large model beside it in FILE_data."""
    file.parent.mkdir(exist_ok=True)
    outside = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) >= INSIDE_BYTES
    onnx.save_model(graph, file, save_as_external_data=outside, location=f"{file.name}_data" if outside else None)
