"""Checkpoints: whole or not there, hashed, and enough to go on bit for bit.

A checkpoint is a folder `step-000050`: adapter/ (PEFT's format), optimizer.safetensors, state.json, and
hashes.json, written last. It is made under another name, synced, and renamed. Random generators need no place in
it: each micro batch seeds them from (seed, step, place), see determinism.py.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_kit.errors import CheckpointError
from qlora_kit.model.source import sha256_file
from qlora_kit.train.run_folder import disk_error


@dataclass
class TrainState:
    """Where a run is. Everything the next step depends on, beside weights and optimizer."""

    step: int = 0
    data_position: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float | None = None
    evals_without_gain: int = 0
    stopped_early: bool = False
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    grad_scaler: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 1
    grad_accum_steps: int = 1
    threads: int = 1
    processes: int = 1
    data_sha256: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: `adapter` is the folder in PEFT's format."""

    folder: Path
    state: TrainState
    optimizer_tensors: dict[str, Tensor]
    optimizer_numbers: dict[str, float]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def save_checkpoint(
    root: Path,
    state: TrainState,
    write_adapter: Any,
    optimizer_tensors: dict[str, Tensor],
    optimizer_numbers: dict[str, float],
) -> Path:
    """Writes checkpoint `step-N` below `root`. `write_adapter(folder)` writes the adapter's files.

    Raises:
        RunError: the disk is full or not writable; what was there before is untouched.
    """
    target = root / f"step-{state.step:06d}"
    partial = root / f".partial-{target.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_adapter(partial / "adapter")
        save_file(optimizer_tensors, partial / "optimizer.safetensors")
        tree = {"format": "qlora-checkpoint/1", "state": asdict(state), "optimizer_numbers": optimizer_numbers}
        (partial / "state.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(partial)): sha256_file(file) for file in files}
        (partial / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for file in [*files, partial / "hashes.json", partial / "adapter", partial]:
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        _sync(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(target, error) from error
    return target


def read_checkpoint(folder: Path) -> Checkpoint:
    """Checks every hash and reads a checkpoint.

    Raises:
        CheckpointError: a file is missing or changed, or the format is not known.
    """
    try:
        hashes = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} is damaged: hashes.json is missing or torn", fix="Use an earlier one"
        ) from None
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing", fix="Use an earlier one")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was written", fix="Use an earlier one")
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if tree.get("format") != "qlora-checkpoint/1":
        raise CheckpointError(f"{folder}: format", got=tree.get("format"), allowed="qlora-checkpoint/1")
    tensors = load_file(folder / "optimizer.safetensors")
    return Checkpoint(folder, TrainState(**tree["state"]), tensors, tree["optimizer_numbers"])


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below `root` and a line for each damaged one passed over; None where none was made.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    folders = checkpoint_folders(root)
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if folders:
        raise CheckpointError(
            f"no whole checkpoint is left in {root}: {' '.join(damaged)}", fix="Start again: --overwrite"
        )
    return None, damaged


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(root.glob("step-[0-9]*")) if root.is_dir() else []


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one, and what kills left half written."""
    for folder in checkpoint_folders(root)[:-keep]:
        if folder.name != f"step-{best_step or 0:06d}":
            shutil.rmtree(folder)
    for partial in root.glob(".partial-*"):
        shutil.rmtree(partial)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
