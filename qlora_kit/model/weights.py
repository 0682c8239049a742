"""What holds for the weights of every base model, wherever they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def refuse_missing_weights(info: dict[str, Any], reference: str) -> None:
    """transformers fills tensors that a file lacks with random numbers and only warns.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` gave.

    Raises:
        ModelError: a tensor is missing, or has another shape.
    """
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get("mismatched_keys", ()))
    if missing or wrong:
        name, what = (missing[0], "is missing in") if missing else (wrong[0], "has another shape in")
        more = f" (and {len(missing) + len(wrong) - 1} more)" if len(missing) + len(wrong) > 1 else ""
        raise ModelError(f"base.model {reference}: tensor {name} {what} the weights{more}", fix="Copy the model again")
