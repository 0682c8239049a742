"""Graphs of decoders that onnxruntime-genai's builder does not know, GPT-2 and GPT-NeoX among them.

torch's exporter writes them, with the builder's names of inputs and outputs. Their cache grows: each run gives keys
and values of all tokens so far, where the builder's graphs write new ones into a buffer. The whole model is in memory
in fp32 while its graph is made.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qlora_kit.adapters.inject import is_tied_head, output_head, untie_head
from qlora_kit.errors import ExportError
from qlora_kit.export.graph import GRAPH, copy_texts
from qlora_kit.export.linear import GraphTensors, node
from qlora_kit.export.merge import conv1d_layers, plain_linear
from qlora_kit.export.nbits import lookup
from qlora_kit.export.parameters import Factors, multiply_parameters
from qlora_kit.export.task_graph import exported, round_products, round_tables, write_graph

PROFILES = ("fp32", "int8")
PAST, PRESENT = "past_key_values.%d", "present.%d"


class _CachedDecoder(nn.Module):
    """Takes ids [batch, new], mask [batch, past + new], keys and values of the past; gives logits, and all of these."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def forward(self, ids: Tensor, mask: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2])))
        start = past[0].shape[2]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]  # padding is on the right
        placed = {"position_ids": positions} if self.takes_positions else {}
        found = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **placed)
        return found.logits, *_tensors(found.past_key_values)


def build_traced_graph(merged: Path, target: Path, profile: str, factors: Factors | None = None) -> None:
    """Writes graph, weights and configuration of the merged model `merged` into the folder `target`.

    Inputs: input_ids int64 [batch, new], attention_mask int64 [batch, past + new], and of each layer
    past_key_values.N.key and .value, float32 [batch, heads, past, head_dim]. Outputs: logits float32
    [batch, new, vocab], and present.N.key and .value [batch, heads, past + new, head_dim].

    Args:
        profile: fp32, or int8 (MatMulNBits in blocks of 32, the head with them; large embeddings as codes).
        factors: what parameters are multiplied by.

    Raises:
        ExportError: another profile, a model that caches something else than keys and values of one shape, or that
            torch cannot export.
    """
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    name = type(model).__name__
    if profile not in PROFILES:
        raise ExportError(
            f"{profile} is for the decoders that onnxruntime-genai's builder knows, and {name} is none",
            allowed=", ".join(PROFILES),
            fix="Export int8",
        )
    multiply_parameters(model, factors)
    _replace_conv1d(model)
    if tied := profile == "int8" and is_tied_head(model, output_head(model)):
        untie_head(model)
    cache = _example_cache(model)
    layers = range(len(cache) // 2)
    names = [[f"{start % k}.{part}" for k in layers for part in ("key", "value")] for start in (PAST, PRESENT)]
    ids, mask = torch.full((2, 3), 3), torch.ones(2, 10, dtype=torch.long)
    mask[1, 8:] = 0  # no size that the graph could take for a constant
    past = tuple(torch.zeros(2, tensor.shape[1], 7, tensor.shape[3]) for tensor in cache)
    auto = torch.export.Dim.AUTO
    graph = exported(
        _CachedDecoder(model),
        (ids, mask, past),
        ["input_ids", "attention_mask", *names[0]],
        ["logits", *names[1]],
        ({0: auto, 1: auto}, {0: auto, 1: auto}, tuple({0: auto, 2: auto} for _ in cache)),
        name,
    )
    if profile == "int8":
        graph = round_products(graph)
        if tied:
            _look_up_in_head(graph.graph, model)
        round_tables(graph.graph)
    write_graph(graph, target / GRAPH)
    _write_genai_config(model, cache, target / "genai_config.json")
    copy_texts(merged, target)


def _tensors(cache: Any) -> tuple[Tensor, ...]:
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def _example_cache(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Keys and values of all layers, each [1, heads, 3, head_dim].

    Raises: ExportError where the model keeps something else.
    """
    cache = getattr(model(torch.full((1, 3), 3), use_cache=True), "past_key_values", None)
    found = _tensors(cache) if isinstance(cache, DynamicCache) else ()
    if len({tensor.shape for tensor in found}) != 1 or not hasattr(model.config, "max_position_embeddings"):
        raise ExportError(
            f"{type(model).__name__} could not be written as an ONNX decoder",
            allowed="decoders with a largest position that keep keys and values, of one shape in all layers",
            fix="Use the merged model",
        )
    return found


def _replace_conv1d(model: PreTrainedModel) -> None:
    """GPT-2's layers [in, out] as linear ones, whose products can be rounded."""
    for name in conv1d_layers(model):
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, plain_linear(layer, layer.weight.T.contiguous(), as_conv1d=False))


def _look_up_in_head(graph: onnx.GraphProto, model: PreTrainedModel) -> None:
    """The rows of an embedding that is the head: of the head's codes, which are stored once."""
    (name,) = (key for key, tensor in model.named_parameters() if tensor is model.get_input_embeddings().weight)
    table = f"model.{name}"  # of _CachedDecoder
    head = next(made for made in graph.node if made.op_type == "MatMulNBits" and made.output[0] == "logits")
    place, gather = next((k, made) for k, made in enumerate(graph.node) if table in made.input)
    codes, scales, zero_points = head.input[1:4]
    width = next(attribute.i for attribute in head.attribute if attribute.name == "K")
    rows = GraphTensors(graph).add(f"{table}.rows", np.array([-1, width]))
    graph.node.insert(place, lookup(gather, f"{table}.codes", scales, zero_points))
    graph.node.insert(place, node("Reshape", [codes, rows], f"{table}.codes"))
    graph.node.remove(gather)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == table))


def _write_genai_config(model: PreTrainedModel, cache: tuple[Tensor, ...], file: Path) -> None:
    """What onnxruntime-genai and the runtime read of a decoder."""
    config: Any = model.config
    ends = config.eos_token_id
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": cache[0].shape[3],
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": f"{PAST}.key",
            "past_value_names": f"{PAST}.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}.key",
            "present_value_names": f"{PRESENT}.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(cache) // 2,
        "num_key_value_heads": cache[0].shape[1],
    }
    tree = {
        "model": {
            "bos_token_id": config.bos_token_id,
            "context_length": config.max_position_embeddings,
            "decoder": decoder,
            "eos_token_id": ends,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else ends,
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {"max_length": config.max_position_embeddings, "past_present_share_buffer": False},
    }
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
