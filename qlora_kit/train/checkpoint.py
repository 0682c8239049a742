"""Checkpoints: whole or not there, hashed, and enough to go on bit for bit.

A checkpoint is a folder `step-000050`: adapter/ (PEFT's format), optimizer.safetensors, state.json, and
hashes.json, written last. It is made under another name, synced, and renamed. Random generators need no place in
it: each micro batch seeds them from (seed, step, place), see determinism.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_kit.atomic import disk_error, sync
from qlora_kit.errors import CheckpointError
from qlora_kit.model.source import sha256_file


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
    """Time in the loop, evaluations and checkpoints included, over all resumes."""
    step_s: float = 0.0
    """Time in training steps alone."""
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0
    grad_scaler: dict[str, Any] = field(default_factory=dict)
    """The loss scale; empty unless base.compute_dtype is fp16."""
    micro_batch_size: int = 1
    grad_accum_steps: int = 1
    threads: int = 1
    processes: int = 1
    device: str = ""
    """Type of device, cpu or cuda; empty in checkpoints from before it was written."""
    data_sha256: str = ""
    base_sha256: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: `adapter` is the folder in PEFT's format."""

    folder: Path
    state: TrainState
    optimizer_tensors: dict[str, Tensor]
    optimizer_numbers: dict[str, float]
    method_tensors: dict[str, Tensor]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


FORMAT = "qlora-checkpoint/1"
METHOD_STATE = "method:"  # what the adapter's method depends on lies among the optimizer's tensors
PARTS = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json")


def save_checkpoint(
    root: Path,
    state: TrainState,
    write_adapter: Callable[[Path], None],
    optimizer_tensors: dict[str, Tensor],
    optimizer_numbers: dict[str, float],
) -> Path:
    """Writes checkpoint `step-N` below `root`, unless a whole one is there: one step has one state.

    Args:
        write_adapter: writes the adapter's files into the folder it is given.

    Raises:
        RunError: the disk is full or not writable; what was there before is untouched.
    """
    target = checkpoint_folder(root, state.step)
    partial = root / f".partial-{target.name}"
    if _is_whole(target):
        return target
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_adapter(partial / "adapter")
        save_file(optimizer_tensors, partial / "optimizer.safetensors")
        tree = {"format": FORMAT, "state": asdict(state), "optimizer_numbers": optimizer_numbers}
        (partial / "state.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        hashes = {file.relative_to(partial).as_posix(): sha256_file(file) for file in files}
        (partial / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for file in [*files, partial / "hashes.json", partial / "adapter", partial]:
            sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(target, _as_os_error(error)) from error
    return target


def read_checkpoint(folder: Path) -> Checkpoint:
    """Checks every hash and reads a checkpoint.

    Raises:
        CheckpointError: a file is missing or changed, or the format is not known.
    """
    check_whole(folder)
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if tree.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format", got=tree.get("format"), allowed=FORMAT, fix="Use an earlier one")
    try:
        state = TrainState(**tree["state"])
    except TypeError as error:
        raise CheckpointError(f"{folder}: another version's state: {error}", fix="Use an earlier one") from None
    tensors = load_file(folder / "optimizer.safetensors")
    of_method = {
        key.removeprefix(METHOD_STATE): tensors.pop(key) for key in list(tensors) if key.startswith(METHOD_STATE)
    }
    return Checkpoint(folder, state, tensors, tree["optimizer_numbers"], of_method)


def check_whole(folder: Path) -> None:
    """Checks that every file of a checkpoint is there and is what was written.

    Raises:
        CheckpointError: one is not.
    """
    try:
        hashes = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        hashes = None
    if not isinstance(hashes, dict) or not hashes.keys() >= set(PARTS):
        raise CheckpointError(f"{folder} is damaged: hashes.json is missing or torn", fix="Use an earlier one")
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing", fix="Use an earlier one")
        if sha256_file(file) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was written", fix="Use an earlier one")


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below `root` and a line for each damaged one passed over; None where none was made.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    folders = checkpoint_folders(root)
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if folders:
        raise CheckpointError(
            f"no whole checkpoint is left in {root}: {' '.join(damaged)}", fix="Start again with --overwrite"
        )
    return None, damaged


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (folder for folder in root.glob("step-*") if folder.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of) if root.is_dir() else []


def prune_checkpoints(root: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one, and what kills left half written."""
    for folder in checkpoint_folders(root)[:-keep]:
        if step_of(folder) != best_step:
            shutil.rmtree(folder)
    for partial in root.glob(".partial-*"):
        shutil.rmtree(partial)


def _is_whole(folder: Path) -> bool:
    try:
        check_whole(folder)
    except CheckpointError:
        return False
    return True


def _as_os_error(error: OSError | SafetensorError) -> OSError:
    """safetensors tells the system's error number only in its text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(None, str(error))
