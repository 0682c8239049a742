"""Where a base model lies: a hub id, a local folder or a GGUF file, always handed on as a safetensors folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import ModelError

CACHE_VERSION = "1"  # raise when the conversion below changes


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


def find_base(model: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseSource:
    """Finds a base model and makes it a local safetensors folder.

    Args:
        model: hub id, folder, or .gguf file (dequantized once to fp32 and cached under `cache_dir()`).

    Raises:
        ModelError: nothing is there, the folder is incomplete, or it needs remote code that is not allowed.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        folder = _convert_gguf(path)
    elif path.is_dir():
        folder = path
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError("base.model names no model", got=model, allowed="a hub id, a folder or a .gguf file")
    else:
        folder = _download(model, revision)
    _check_folder(folder, model, trust_remote_code)
    kept = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(kept))
    return BaseSource(model, revision, folder, {file.name: sha256_file(file) for file in files})


def cache_dir() -> Path:
    """Folder for converted models: $QLORA_KIT_CACHE, else ~/.cache/qlora-kit."""
    return Path(os.environ.get("QLORA_KIT_CACHE", "~/.cache/qlora-kit")).expanduser()


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_folder(folder: Path, model: str, trust_remote_code: bool) -> None:
    import json

    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"base.model {model}: {folder} has no config.json", fix="Give the folder of a transformers model"
        )
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"base.model {model}: {config} is not JSON: {error}", fix="Copy the model again") from None
    if "auto_map" in tree and "model_type" not in tree and not trust_remote_code:
        raise ModelError(
            f"base.model {model} needs Python code from its repository",
            fix="Read that code, then set base.trust_remote_code=true",
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only {pickled[0].name}, which is a pickle and could run code" if pickled else "no weights"
        raise ModelError(
            f"base.model {model}: {folder} holds {found}", allowed=".safetensors", fix="Convert it to safetensors"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {weight.name for weight in weights})
        if missing:
            raise ModelError(
                f"base.model {model}: shard {missing[0]} is missing in {folder}", fix="Copy the model again"
            )


def _download(model: str, revision: str | None) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"base.model {model}: no such folder here, and the hub did not give it ({reason})",
            fix="Check the spelling, the network or the access token, or give a local folder",
        ) from None


def _convert_gguf(path: Path) -> Path:
    """GGUF to a cached folder: dequantized to fp32, so that its own codes are kept exactly, tokenizer included."""
    if not path.is_file():
        raise ModelError(
            "base.model: no such GGUF file", got=str(path), fix="Check the path (make demo fetches the demo's)"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"base.model {path} is not a GGUF file", fix="Download it again")
    target = cache_dir() / "gguf" / f"{sha256_file(path)[:24]}-{CACHE_VERSION}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config._name_or_path = ""
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(partial)
        os.replace(partial, target)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"base.model {path}: this GGUF cannot be read: {error}", fix="Use a safetensors model"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
