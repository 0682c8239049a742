"""Ways in which a checkpoint can be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_kit.model.source import sha256_file


def flip(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def tear(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def foreign(folder: Path) -> None:
    """Whole by its hashes, and of a format that is not known."""
    state = folder / "state.json"
    state.write_text(state.read_text().replace("qlora-checkpoint/1", "qlora-checkpoint/9"))
    _hash_again(folder)


def rewrite_state(folder: Path, **fields: Any) -> None:
    """Whole by its hashes, and with other fields of TrainState; None takes a field out."""
    tree = json.loads((folder / "state.json").read_text())
    state = {**tree["state"], **fields}
    tree["state"] = {name: value for name, value in state.items() if name not in fields or value is not None}
    (folder / "state.json").write_text(json.dumps(tree))
    _hash_again(folder)


def _hash_again(folder: Path) -> None:
    hashes = json.loads((folder / "hashes.json").read_text())
    (folder / "hashes.json").write_text(json.dumps({**hashes, "state.json": sha256_file(folder / "state.json")}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip, "adapter/adapter_model.safetensors is not what was written"),
    "missing weights": (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "missing adapter": (lambda f: shutil.rmtree(f / "adapter"), "adapter/adapter_config.json is missing"),
    "torn state": (tear("state.json"), "state.json is not what was written"),
    "torn hashes": (tear("hashes.json"), "hashes.json is missing or torn"),
    "no hashes": (lambda f: (f / "hashes.json").unlink(), "hashes.json is missing or torn"),
    "empty hashes": (lambda f: (f / "hashes.json").write_text("{}"), "hashes.json is missing or torn"),
    "hashes of another kind": (lambda f: (f / "hashes.json").write_text("[1]"), "hashes.json is missing or torn"),
    "foreign format": (foreign, "format (got 'qlora-checkpoint/9'). Allowed: qlora-checkpoint/1"),
    "emptied": (lambda f: [shutil.rmtree(f), f.mkdir()], "hashes.json is missing or torn"),
}
