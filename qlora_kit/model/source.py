"""Where a base model lies: a hub id, a local folder or a GGUF file, always handed on as a safetensors folder."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.model.gguf import convert_gguf
from qlora_kit.model.weights import first_line, sha256_file, sha256_once

__all__ = ["BaseSource", "cache_dir", "find_base", "sha256_file"]
_WEIGHTS = "*.safetensors"
_OTHERS = ["*.json", "*.jinja", "*.model", "*.txt"]  # config and tokenizer
_IGNORED = ["consolidated*", "*/*"]  # the same weights again in another form; fnmatch's * crosses "/"


@dataclass(frozen=True)
class BaseSource:
    """A base model on this machine's disk.

    Attributes:
        folder: config, tokenizer and safetensors files.
        sha256: file name to sha256, hex, of all that defines the model (weights, config, tokenizer).
    """

    reference: str
    revision: str | None
    folder: Path
    sha256: dict[str, str]

    def fingerprint(self) -> str:
        """One sha256 over all files."""
        lines = "\n".join(f"{name} {digest}" for name, digest in sorted(self.sha256.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def find_base(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    field: str = "base.model",
) -> BaseSource:
    """Finds a base model and makes it a local safetensors folder.

    Args:
        model: hub id, folder, or .gguf file (dequantized once to fp32 and cached under `cache_dir()`).
        weights: False where config and tokenizer do: a hub's weights are then not downloaded, and none are hashed.
        field: of the recipe, that errors name.

    Raises:
        ModelError: nothing is there, the folder is incomplete, or it needs remote code that is not allowed.
    """
    path = Path(model).expanduser()
    if revision is not None and (path.suffix.lower() == ".gguf" or path.is_dir()):
        raise ModelError(
            f"base.revision means a hub id's version; {model} is a path", got=revision, fix="Set base.revision=null"
        )
    if path.suffix.lower() == ".gguf":
        folder = convert_gguf(path, cache_dir())
    elif path.is_dir():
        folder = path
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"{field} names no model", got=model, allowed="a hub id, a folder or a .gguf file")
    else:
        folder = _download(model, revision, weights)
    _check_config(folder, model, trust_remote_code)
    if weights:
        _check_weights(folder, model)
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kept(file.name, weights))
    return BaseSource(model, revision, folder, {file.name: sha256_once(file, cache_dir()) for file in files})


def cache_dir() -> Path:
    """Folder for converted models: $QLORA_KIT_CACHE, else ~/.cache/qlora-kit."""
    return Path(os.environ.get("QLORA_KIT_CACHE", "~/.cache/qlora-kit")).expanduser()


def _kept(name: str, weights: bool) -> bool:
    wanted = [*_OTHERS, _WEIGHTS] if weights else _OTHERS
    return any(fnmatch(name, one) for one in wanted) and not any(fnmatch(name, one) for one in _IGNORED)


def _check_config(folder: Path, model: str, trust_remote_code: bool) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"base.model {model}: {folder} has no config.json", fix="Give the folder of a transformers model"
        )
    tree = _read_json(config, model)
    if "auto_map" in tree and not trust_remote_code and not _known(tree.get("model_type")):
        raise ModelError(
            f"base.model {model} needs Python code from its repository",
            fix="Read that code, then set base.trust_remote_code=true",
        )


def _check_weights(folder: Path, model: str) -> None:
    weights = {file.name for file in folder.glob(_WEIGHTS) if _kept(file.name, weights=True)}
    if not weights:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only {pickled[0].name}, which is a pickle and could run code" if pickled else "no weights"
        raise ModelError(
            f"base.model {model}: {folder} holds {found}", allowed=".safetensors", fix="Convert it to safetensors"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index, model).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(f"base.model {model}: {index} has no weight_map", fix="Copy the model again")
        missing = sorted({str(shard) for shard in shards.values()} - weights)
        if missing:
            raise ModelError(
                f"base.model {model}: shard {missing[0]} is missing in {folder}", fix="Copy the model again"
            )


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"base.model {model}: {path} is not JSON: {error}", fix="Copy the model again") from None
    if not isinstance(tree, dict):
        raise ModelError(f"base.model {model}: {path} is not a JSON object", fix="Copy the model again")
    return tree


def _known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of the client that it was built on

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*_OTHERS, _WEIGHTS] if weights else _OTHERS,
                ignore_patterns=_IGNORED,
            )
        )
    except (HFValidationError, HTTPError, OSError) as error:
        raise ModelError(
            f"base.model {model}: no such folder here, and the hub did not give it ({first_line(error)})",
            fix="Check the spelling, the network or the access token, or give a local folder",
        ) from None
