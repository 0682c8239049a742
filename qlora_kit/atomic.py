"""Writes that are whole or not there at all, and disk errors that say what to do."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError


def write_atomically(path: Path, text: str) -> None:
    """The file is the old or the new one, never half of it.

    Raises:
        RunError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def write_json(path: Path, tree: Any) -> None:
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: Path, error: OSError) -> RunError:
    """An OSError of a write, as an error that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full while writing {path}", fix="Free some space and try again (train: --resume)")
    return RunError(
        f"{path} cannot be written: {error.strerror or error}",
        fix="Check the folder's permissions and try again (train: --resume)",
    )
