"""What holds for the weights of every base model, wherever they come from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from qlora_kit.atomic import write_json
from qlora_kit.errors import ModelError, RunError

_BIG = 64 * 2**20  # bytes from which a file's hash is worth remembering
_SETTLED_NS = 2 * 10**9  # a file this young may change again without another time stamp


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path, cache: Path) -> str:
    """`sha256_file`, remembered for big files below `cache` while path, size and modification time stay the same."""
    before = path.stat()
    if before.st_size < _BIG:
        return sha256_file(path)
    place = str(path.resolve())
    known = {"path": place, "size": before.st_size, "mtime_ns": before.st_mtime_ns}
    entry = cache / "sha256" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:24]}.json"
    remembered = _remembered(entry, known)
    if remembered is not None:
        return remembered
    settled = time.time_ns() - before.st_mtime_ns > _SETTLED_NS
    digest, after = sha256_file(path), path.stat()
    if settled and (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
        _remember(entry, {**known, "sha256": digest})
    return digest


def _remembered(entry: Path, known: dict[str, Any]) -> str | None:
    try:
        tree = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    digest = tree.pop("sha256", None) if isinstance(tree, dict) else None
    fits = tree == known and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    return digest if fits else None


def _remember(entry: Path, tree: dict[str, Any]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, tree)
    except (OSError, RunError):
        return  # a cache that cannot be written costs time, not correctness


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def refuse_missing_weights(info: dict[str, Any], reference: str, fresh: list[str] | None = None) -> None:
    """transformers fills tensors that a file lacks with random numbers and only warns.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` gave.
        fresh: modules whose weights may be made new.

    Raises:
        ModelError: a tensor is missing, or has another shape.
    """
    inside = tuple(f"{name}." for name in fresh or [])
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(inside))
    wrong = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get("mismatched_keys", ()))
    wrong = [key for key in wrong if not key.startswith(inside)]
    if missing or wrong:
        name, what = (missing[0], "is missing in") if missing else (wrong[0], "has another shape in")
        more = f" (and {len(missing) + len(wrong) - 1} more)" if len(missing) + len(wrong) > 1 else ""
        raise ModelError(f"base.model {reference}: tensor {name} {what} the weights{more}", fix="Copy the model again")
