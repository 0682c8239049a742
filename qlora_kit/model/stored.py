"""Quantized checkpoints on disk: what a `QuantizedLinear` holds in memory, whatever its kind, byte for byte.

A folder of config, tokenizer and sharded safetensors as any model's. A quantized layer's buffers are tensors called
LAYER.BUFFER; quantized.json tells each such layer's shape and kind, how the folder was made, and the shards' hashes.
transformers' own loader reads it through the quantizer registered here, and the tensors stay mapped to the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.errors import ModelError
from qlora_kit.model.quantize import Quantization
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import coded_head, head_weights, put_coded_head
from qlora_kit.model.source import BaseSource

MANIFEST = "quantized.json"
FORMAT = 1  # raise when what model/storing.py writes changes
NAME = "qlora_kit"  # in config.json, so that others say that they don't know it instead of loading random weights


@dataclass(frozen=True)
class Stored:
    """What quantized.json says."""

    folder: Path
    made_as: dict[str, Any]
    """All that decided over the bytes (see cache.py)."""
    layers: dict[str, dict[str, Any]]
    """Quantized layer to the attributes and buffers (dtype and shape) of its `QuantizedLinear`."""
    sha256: dict[str, str]
    """Shard to the hash of its content, hex."""

    def damaged(self, sha256: dict[str, str]) -> str | None:
        """The first shard that is not as it was written, given what files hash to now."""
        return next((name for name, digest in self.sha256.items() if sha256.get(name) != digest), None)


def is_stored(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_stored(folder: Path) -> Stored:
    """What a stored folder says of itself; its shards are not looked at.

    Raises:
        ModelError: quantized.json is damaged, or of another version of this format.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        version = tree["format"]
        stored = Stored(folder, tree["made_as"], tree["layers"], tree["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error!r})", fix="Write it again: qlora-kit quantize") from None
    if version != FORMAT:
        fix = "Write it again: qlora-kit quantize"
        raise ModelError(f"{path} is of another version", got=version, allowed=str(FORMAT), fix=fix)
    return stored


def check_stored(source: BaseSource, wanted: Quantization | None, skip_modules: list[str] | None) -> None:
    """Whether a base that is stored quantized is whole, and quantized as it is wanted; None wants it unquantized.

    Raises:
        ModelError: it is not.
    """
    stored = read_stored(source.folder)
    if (name := stored.damaged(source.sha256)) is not None:
        fix = "Write it again: qlora-kit quantize"
        raise ModelError(f"base.model {source.reference}: {name} is not as it was written", fix=fix)
    if wanted is None:
        fix = "Give the folder of the model that it was made from"
        raise ModelError(
            f"base.model {source.reference} is quantized, and the adapter's method needs it whole", fix=fix
        )
    made = stored.made_as["quant"]
    if wanted.kind != made["kind"]:
        fix = f"Set base.quant={made['kind']}, or give the folder of the model that it was made from"
        raise ModelError(
            f"base.model {source.reference} is stored as {made['kind']}", got=wanted.kind, allowed=made["kind"], fix=fix
        )
    if wanted.head != made.get("head", "none"):
        head = made.get("head", "none")
        fix = f"Set base.head_quant={head}, or give the folder of the model that it was made from"
        raise ModelError(
            f"base.model {source.reference} is stored with its head as {head}", got=wanted.head, allowed=head, fix=fix
        )
    for option, value in wanted.options().items():
        decides = (wanted.kind, wanted.head) not in (("int8", "none"), ("int8", "int8"))
        if decides and value != made.get(option):
            fix = f"Set base.{option}={json.dumps(made.get(option))}, or quantize it again"
            raise ModelError(f"base.model {source.reference} is stored otherwise", got=value, fix=fix)
    for name in skip_modules or []:
        inside = next((layer for layer in stored.layers if f".{layer}.".find(f".{name}.") >= 0), None)
        if inside:
            fix = "Give the folder of the model that it was made from"
            raise ModelError(f"base.model {source.reference}: {inside} is quantized, and is to be trained", fix=fix)


@register_quantization_config(NAME)
class StoredConfig(QuantizationConfigMixin):
    """The mark in a stored folder's config.json."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method: Any = NAME


@register_quantizer(NAME)
class StoredQuantizer(HfQuantizer):
    """Makes the empty layers that transformers' loader then fills from the files."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        for name, described in read_stored(Path(checkpoint_files[0]).parent).layers.items():
            if model.get_submodule(name) is model.get_output_embeddings():
                _prepare_embedding(model)
            model.set_submodule(name, _empty_layer(described, model.get_submodule(name).bias))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for layer in quantized_layers(model).values():
            del layer.weight
        if (head := coded_head(model)) is not None:
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
            put_coded_head(model, head, model.config.dtype)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _prepare_embedding(model: Any) -> None:
    """Of a head that is stored as codes: where it is tied, the embedding's weight is in no file, and nothing ties it
    while the codes are read."""
    for name in head_weights(model)[1:]:
        embedding = model.get_submodule(name.removesuffix(".weight"))
        del embedding.weight
        embedding.weight = _no_weight()
    model.all_tied_weights_keys = {}


def _no_weight() -> torch.Tensor:
    """For some models' own initialization, which asks for one."""
    weight: Any = torch.empty(0)
    weight._is_hf_initialized = True
    found: torch.Tensor = weight
    return found


def _empty_layer(described: dict[str, Any], bias: nn.Parameter | None) -> QuantizedLinear:
    layer: Any = QuantizedLinear(described["in_features"], described["out_features"], described["quant"], bias)
    layer.block_size, layer.nested_block_size = described["block_size"], described["nested_block_size"]
    for name, (dtype, shape) in described["buffers"].items():
        layer.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
    layer.weight = _no_weight()
    found: QuantizedLinear = layer
    return found
