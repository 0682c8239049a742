"""Writes a quantized model as a stored folder (model/stored.py), whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.atomic import disk_error, sync, write_json
from qlora_kit.errors import ModelError
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.stored import FORMAT, MANIFEST, NAME, is_stored, quantized_layers
from qlora_kit.model.weights import sha256_file

SHARD_BYTES = 2**30
_INDEX = "model.safetensors.index.json"
_SPARE_BYTES = 64 * 2**20  # left free on a disk


@torch.no_grad()
def write_stored(
    model: PreTrainedModel, source: Path, target: Path, made_as: dict[str, Any], leave_out: frozenset[str] = frozenset()
) -> int:
    """Writes a loaded model as a stored folder, whole or not at all, and only where there is none. Returns its bytes.

    Args:
        source: the folder that it was loaded from, of which config and tokenizer are copied.
        leave_out: tensors that are none of the base's, such as those of a fresh head.

    Raises:
        ModelError: the disk has no room for it.
        RunError: it cannot be written.
    """
    tensors = _own_tensors(model, leave_out)
    needed = sum(map(_bytes, tensors.values()))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed + _SPARE_BYTES:
            room = f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB free"
            raise ModelError(f"{target.parent} has no room for the quantized model: {room}", fix="Free some space")
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    except OSError as error:
        raise disk_error(target, error) from None
    try:
        _copy_others(source, partial)
        hashes = _write_shards(tensors, partial)
        layers = {name: _described(layer) for name, layer in quantized_layers(model).items()}
        write_json(partial / MANIFEST, {"format": FORMAT, "made_as": made_as, "layers": layers, "sha256": hashes})
        sync(partial)
        _move(partial, target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return needed


def _described(layer: QuantizedLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "quant": layer.quant,
        "block_size": layer.block_size,
        "nested_block_size": layer.nested_block_size,
        "buffers": {name: [str(b.dtype).removeprefix("torch."), list(b.shape)] for name, b in layer.named_buffers()},
    }


def _own_tensors(model: PreTrainedModel, leave_out: frozenset[str]) -> dict[str, Tensor]:
    """All that is saved of a model: of tied tensors, the first name alone."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if name not in leave_out and (place not in seen or not tensor.numel()):
            tensors[name] = tensor
            seen.add(place)
    return tensors


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy_others(source: Path, folder: Path) -> None:
    """Config, tokenizer and what else lies beside the weights; the config gets this format's mark."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in (_INDEX, MANIFEST):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": NAME}})


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Writes shards and their index; returns the shards' hashes."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and sum(map(_bytes, parts[-1].values())) + _bytes(tensor) > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({key: tensor.cpu().contiguous() for key, tensor in part.items()}, folder / name, {"format": "pt"})
        sync(folder / name)
        hashes[name] = sha256_file(folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / _INDEX, {"metadata": {}, "weight_map": weight_map})
    return hashes


def _move(partial: Path, target: Path) -> None:
    """Renames in one step; where another process was first, its folder stays."""
    try:
        os.replace(partial, target)
    except OSError:
        if not is_stored(target):
            raise
