"""The two files of an adapter in PEFT's format, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_kit.errors import AdapterError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes the two files of an adapter into `folder`, which is there."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_files(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """What adapter_config.json says, of whatever type, and the tensors by PEFT's names.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} is no adapter: {name} is missing", fix="Give the folder that PEFT or train wrote"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON: {error}", fix="Save the adapter again") from None
    return config, read_tensors(folder / WEIGHTS)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that is there.

    Raises:
        AdapterError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged: {error}", fix="Copy or save the adapter again") from None
