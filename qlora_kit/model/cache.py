"""Quantized models kept on disk, so that a second load takes seconds: found by all that decides over their bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.errors import ModelError, RunError
from qlora_kit.model.source import BaseSource, cache_dir
from qlora_kit.model.stored import FORMAT, is_stored, read_stored
from qlora_kit.model.storing import write_stored
from qlora_kit.model.weights import sha256_once

_BACKENDS = ("bitsandbytes", "qlora-kit", "torch", "transformers")  # int4 is quantized here
_log = logging.getLogger("qlora_kit")


def made_as(
    source: BaseSource, quant: dict[str, Any], compute_dtype: torch.dtype, device: Any, unquantized: Any, model: Any
) -> dict[str, Any]:
    """All that decides over the bytes of a quantized base, and the name by which people know it.

    Args:
        quant: its kind and that kind's options.
        compute_dtype: weights are rounded to it before they are quantized.
        device: whose kernels quantize.
        unquantized: names of layers that are left out, None for the head alone.
        model: which model transformers makes of it.
    """
    return {
        "name": Path(source.reference).name,
        "base": source.fingerprint(),
        "quant": quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "unquantized": sorted(unquantized or []),
        "model": model,
        "backend": {name: version(name) for name in _BACKENDS} | {"device": torch.device(device).type},
    }


def cached(wanted: dict[str, Any]) -> Path | None:
    """The folder of the quantized base that was made as `wanted`; None where there is none.

    One that is damaged or was made otherwise is removed, with a word of warning.
    """
    folder = _place(wanted)
    if not is_stored(folder):
        return None
    try:
        stored = read_stored(folder)
        if stored.made_as != json.loads(json.dumps(wanted)):
            raise ModelError(f"{folder} was made from another model or in another way")
        hashes = {name: sha256_once(folder / name, cache_dir()) for name in stored.sha256}
        if (name := stored.damaged(hashes)) is not None:
            raise ModelError(f"{folder / name} is not as it was written")
        os.utime(folder)  # when it was last used
    except (ModelError, OSError) as error:
        _log.warning("The cache of quantized models: %s It is made again.", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder


def keep(model: PreTrainedModel, source: BaseSource, wanted: dict[str, Any], leave_out: frozenset[str]) -> None:
    """Puts a base that was quantized just now into the cache; where that fails, it says so and goes on."""
    try:
        write_stored(model, source.folder, _place(wanted), wanted, leave_out)
    except (ModelError, RunError) as error:
        _log.warning("The quantized model is not cached: %s", error)


@dataclass(frozen=True)
class Kept:
    """One folder of the cache."""

    folder: Path
    kind: str
    """A model that was quantized, or a GGUF file that was converted."""
    bytes: int
    used: float
    """Seconds since the epoch: when it was last loaded, or made."""
    about: str = ""
    """What it was made from, and how."""


def kept_models() -> list[Kept]:
    """What the cache holds, last used first; leftovers of processes that were killed among it."""
    found = []
    for kind in ("quantized", "gguf"):
        for folder in sorted((cache_dir() / kind).glob("*")):
            files = [file for file in folder.rglob("*") if file.is_file()]
            label = "unfinished" if folder.name.startswith(".partial-") else kind
            size, about = sum(file.stat().st_size for file in files), _about(folder)
            found.append(Kept(folder, label, size, folder.stat().st_mtime, about))
    return sorted(found, key=lambda one: -one.used)


def forget(names: list[str]) -> list[Kept]:
    """Removes what is named, all without names, and returns it.

    Raises:
        ModelError: the cache holds nothing of that name.
    """
    there = {one.folder.name: one for one in kept_models()}
    if unknown := [name for name in names if name not in there]:
        raise ModelError("the cache holds no such folder", got=unknown[0], allowed=", ".join(there) or "it is empty")
    gone = [there[name] for name in names or there]
    for one in gone:
        shutil.rmtree(one.folder)
    return gone


def _about(folder: Path) -> str:
    try:
        made = read_stored(folder).made_as if is_stored(folder) else {}
    except ModelError:
        return "damaged"
    return f"{made['name']}, {made['quant']['kind']}, {made['compute_dtype']}" if made else ""


def _place(wanted: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([FORMAT, wanted], sort_keys=True).encode()).hexdigest()
    return cache_dir() / "quantized" / key[:24]
