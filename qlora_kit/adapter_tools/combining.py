"""Several adapters on disk become one, with a note of how it was made: combined.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapter_tools.sources import Source, check_new, check_same_base, write_new
from qlora_kit.adapters.combine import Combination, Combined, combine
from qlora_kit.adapters.deltas import delta_tensors, layer_ranks, other_tensors, read_deltas, read_places
from qlora_kit.adapters.files import PREFIX
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.peft_config import unscaled_config
from qlora_kit.errors import AdapterError

FORMAT = "qlora-combined/1"
NOTE = "combined.json"


def combine_sources(
    sources: list[Source], weights: list[float], target: Path, combination: Combination, force: bool = False
) -> dict[str, Any]:
    """Writes the combination into the new folder `target`, an ordinary LoRA adapter. Returns what combined.json says.

    Modules trained in full and trained biases have no weight: those that one adapter has, or all the same, are taken
    as they are.

    Args:
        force: combine although the adapters name different bases.

    Raises:
        AdapterError: an adapter is not ordinary LoRA, the adapters do not go together, or an argument is wrong.
    """
    check_new(target)
    if not force:
        check_same_base(sources)
    layers = combine([read_deltas(source.stored, source.folder) for source in sources], weights, combination)
    found = {name: layer.delta for name, layer in layers.items()}
    places = {name: place for source in sources for name, place in read_places(source.stored).items()}
    ranks = layer_ranks(found, places)
    full = _in_full(sources, list(ranks))
    note = {
        "format": FORMAT,
        **asdict(combination),
        "sources": [_described(source, weight) for source, weight in zip(sources, weights, strict=True)],
        "taken_in_full": sorted(full),
        "layers": {name: _measured(layer) for name, layer in layers.items()},
    }
    config = unscaled_config(ranks, _config(sources, list(ranks)))
    write_new(target, config, delta_tensors(found, places, DTYPES[combination.dtype]) | full, {NOTE: note})
    return note


def _described(source: Source, weight: float) -> dict[str, Any]:
    return {"folder": str(source.folder), "sha256": source.sha256, "base": source.base, "weight": weight}


def _measured(layer: Combined) -> dict[str, Any]:
    measured = {"norm": layer.delta.norm(), "lost": layer.lost, "from_sum": layer.from_sum}
    rounded = {key: None if value is None else float(f"{value:.6g}") for key, value in measured.items()}
    return {"rank": layer.delta.rank, **rounded}


def _config(sources: list[Source], layers: list[str]) -> dict[str, Any]:
    """What the result takes from the sources' configurations: name endings too, where they mean the same layers."""
    configs = [source.config for source in sources]
    targets = configs[0].get("target_modules")
    same = all(config.get("target_modules") == targets for config in configs)
    same = same and all(set(source.stored.layers()) == set(layers) for source in sources)
    biases = {config.get("bias") or "none" for config in configs}
    saved = dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or [])
    return configs[0] | {
        "lora_dropout": 0.0,
        "target_modules": targets if same else layers,
        "bias": next(bias for bias in ("all", "lora_only", "none") if bias in biases),
        "modules_to_save": list(saved) or None,
    }


def _in_full(sources: list[Source], layers: list[str]) -> dict[str, Tensor]:
    """All that the adapters hold beside their deltas.

    Raises:
        AdapterError: two differ in it, or one trains in full what the other gives a delta.
    """
    found: dict[str, Tensor] = {}
    for source in sources:
        if (source.stored.config.get("bias") or "none") != "none" and set(source.stored.layers()) != set(layers):
            raise AdapterError(
                f"{source.folder} trains biases, and the other adapters have other layers",
                fix="Train it with adapter.bias=none, or with the same target_modules",
            )
        for key, tensor in other_tensors(source.stored, source.folder).items():
            if key in found and not torch.equal(found[key], tensor):
                raise AdapterError(
                    f"{source.folder}: {key} is trained in full, and not the same as in another adapter",
                    fix="Combine adapters without modules_to_save, new tokens or biases",
                )
            layer = key.removeprefix(PREFIX).rpartition(".")[0]
            if layer in layers:
                raise AdapterError(
                    f"{source.folder} trains {layer} in full, where another adapter has a delta",
                    fix="Combine adapters with the same modules_to_save",
                )
            found[key] = tensor
    return found
