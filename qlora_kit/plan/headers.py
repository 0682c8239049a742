"""In which dtype a checkpoint stores its weights: asked of the safetensors headers, else of the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_kit.recipe import BaseSection

_OF_HEADER = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_OF_CONFIG = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_LONGEST_HEADER = 100 * 2**20  # safetensors' own limit


def stored_dtype(base: BaseSection, config: dict[str, Any]) -> str | None:
    """bf16, fp16 or fp32; None where nothing tells, or where tensors differ.

    Tensors that are used in the dtype in which they are stored stay mapped to their file on a CPU. Those of a GGUF file
    are converted to fp32 once.
    """
    path = Path(base.model).expanduser()
    if path.suffix.lower() == ".gguf":
        return "fp32"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if files:
        found = {dtype for file in files for dtype in _header_dtypes(file)}
        return _OF_HEADER.get(found.pop()) if len(found) == 1 else None
    return _OF_CONFIG.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def _header_dtypes(file: Path) -> set[str]:
    """Dtypes in one file's header; none where it is not readable, which loading will say."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            tree = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        except ValueError:
            return set()
    return {entry["dtype"] for name, entry in tree.items() if name != "__metadata__"}
