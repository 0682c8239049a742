"""Decoder graphs from onnxruntime-genai's model builder, laid out as a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from qlora_kit.errors import ExportError
from qlora_kit.export.forms import Forms
from qlora_kit.export.parameters import Factors, MergedWeights, write_factors
from qlora_kit.export.weights import DecoderGraph

GRAPH, DATA = "onnx/model.onnx", "model.onnx_data"


class UnknownToBuilder(ExportError):
    """onnxruntime-genai's builder has no graph of this architecture."""


def build_graph(merged: Path, target: Path, forms: Forms, factors: Factors | None = None) -> None:
    """Writes graph, weights and configuration of the merged model `merged` into the folder `target`.

    Args:
        forms: how each linear layer is stored; embeddings stay fp32.
        factors: what parameters are multiplied by as they are read.

    Raises:
        UnknownToBuilder: the builder has no graph of this architecture (GPT-2, for one).
        ExportError: it cannot write this model.
    """
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    # A cache of one shape for all layers; q, k and v as they are named in the model.
    options = ["hf_remote=false", "windowed_kv_cache=false", "fuse_qkv=false"]
    shared = bool(config.get("tie_word_embeddings")) and forms.shares_head
    options.append(f"shared_embeddings={'true' if shared else 'false'}")
    with tempfile.TemporaryDirectory() as folder:
        write_factors(factors or {}, file := Path(folder) / "factors.safetensors")
        command = [sys.executable, "-m", "qlora_kit.export.builder", str(merged), str(target), str(file), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        kind = UnknownToBuilder if "not currently supported" in reason else ExportError
        raise kind(
            f"{config['architectures'][0]} could not be written as an ONNX decoder ({reason})",
            allowed="the decoder architectures of onnxruntime-genai: Llama, Qwen, Mistral, Gemma, Phi and kin",
            fix=f"Use the merged model in {merged}",
        )
    shutil.rmtree(target / ".cache", ignore_errors=True)
    _write_graph(MergedWeights(merged, factors), target, forms, attention_windows(config))
    copy_texts(merged, target)


def copy_texts(merged: Path, target: Path) -> None:
    """What a decoder's bundle says of its model beside the graph: configuration, tokenizer and chat template."""
    for name in ("config.json", "generation_config.json"):
        if (merged / name).exists():
            shutil.copyfile(merged / name, target / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (merged / name).exists():  # the trained tokenizer's own bytes, not the builder's rewriting of them
            shutil.copyfile(merged / name, target / name)
    _suit_transformers_js(target)


def _suit_transformers_js(target: Path) -> None:
    """What transformers.js reads elsewhere: it knows no chat_template.jinja, and takes onnx/model.onnx for q8."""
    own = {"dtype": "fp32", "use_external_data_format": True}  # fp32: the name of the file, without an ending
    _edit_json(target / "config.json", {"transformers.js_config": own})
    template = target / "chat_template.jinja"
    if template.exists():
        _edit_json(target / "tokenizer_config.json", {"chat_template": template.read_text(encoding="utf-8")})


def _edit_json(path: Path, change: dict[str, Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def attention_windows(config: dict[str, Any]) -> list[int]:
    """Tokens that each layer looks back on, its own included; -1 for all. [layers]"""
    window = config.get("sliding_window") or -1
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def _write_graph(weights: MergedWeights, target: Path, forms: Forms, windows: list[int]) -> None:
    """Writes onnx/model.onnx and its weights, onnx/model.onnx_data, where all runtimes look.

    The builder leaves the attention window out of graphs of Mistral and others, so each layer's is written in.
    """
    (target / "onnx").mkdir()
    graph = DecoderGraph(target / "model.onnx", weights)
    attention = [node for node in graph.model.graph.node if node.op_type == "GroupQueryAttention"]
    for node, window in zip(attention, windows, strict=True):
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = window
    path = target / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    decoder["filename"] = GRAPH
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _fix_head_size(graph.model, decoder["head_size"])
    graph.pack_attention(forms.packs)
    if forms.packs_all:
        graph.pack_others(forms.packs)
    graph.write(target / GRAPH, forms)
    (target / "model.onnx").unlink()


def _fix_head_size(graph: onnx.ModelProto, head_size: int) -> None:
    """The cache's last dimension as a number: transformers.js makes its first, empty cache by these shapes alone."""
    for value in [*graph.graph.input, *graph.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
