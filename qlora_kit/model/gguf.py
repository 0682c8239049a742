"""GGUF files as safetensors folders: converted once, then found again in a cache."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.model.weights import first_line, refuse_missing_weights, sha256_once

CACHE_VERSION = "1"  # raise when the conversion below changes
READ_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    RuntimeError,
    ImportError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What the gguf package and transformers raise on a damaged file: they trust its counts and offsets."""


def convert_gguf(path: Path, cache: Path) -> Path:
    """GGUF to a cached folder: dequantized to fp32, so that its own codes are kept exactly, tokenizer included.

    Raises:
        ModelError: no such file, a damaged one, an architecture that is not supported, or a disk that is full.
    """
    if not path.is_file():
        raise ModelError(
            "base.model: no such GGUF file", got=str(path), fix="Check the path (make demo fetches the demo's)"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"base.model {path} is not a GGUF file", fix="Download it again")
    target = cache / "gguf" / f"{sha256_once(path, cache)[:24]}-{CACHE_VERSION}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    except OSError as error:
        raise ModelError(f"{target.parent} cannot be written: {error.strerror}", fix="Set QLORA_KIT_CACHE") from None
    try:
        _write_folder(path, partial)
        _move(partial, target)
    except READ_ERRORS as error:
        raise ModelError(
            f"base.model {path}: this GGUF cannot be read: {first_line(error)}",
            fix="Download it again, or use a safetensors model",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_folder(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, info = loaded
    refuse_missing_weights(info, str(path))
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _move(partial: Path, target: Path) -> None:
    """Renames in one step; where another process was first, its folder stays."""
    try:
        os.replace(partial, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
