"""Checkpoints are whole or not there: damage is found, named and survived; a full disk costs nothing that was there."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import DAMAGES, flip
from tiny_runs import (
    ForkedCli,
    adapter_sha256,
    tiny_recipe,
    tiny_tree,
    train_here,
    write_recipe,
)

from qlora_kit.errors import CheckpointError, RunError
from qlora_kit.train.checkpoint import (
    TrainState,
    checkpoint_folders,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)

TENSORS = {"w/exp_avg": torch.arange(6.0).view(2, 3), "w/low_bits": torch.tensor([-5, 7], dtype=torch.int16)}
NUMBERS = {"w/step": 3, "w/beta": 0.1 + 0.2}


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 10)


def save(root: Path, step: int, writer: Callable[[Path], None] = write_adapter, **fields: Any) -> Path:
    return save_checkpoint(root, TrainState(step=step, **fields), writer, TENSORS, NUMBERS)


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "data_position": {"rows_dealt": 12},
        "best_loss": 1 / 3,
        "grad_scaler": {"scale": 65536.0},
    }
    folder = save(tmp_path, 50, **fields)
    found = read_checkpoint(folder)
    assert folder.name == "step-000050"
    assert found.state == TrainState(step=50, **fields)
    assert found.optimizer_numbers == NUMBERS
    assert found.optimizer_tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.optimizer_tensors[key], value) for key, value in TENSORS.items())
    assert (found.adapter / "adapter_config.json").is_file()
    assert names(tmp_path) == ["step-000050"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    spoil, says = DAMAGES[damage]
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    spoil(newest)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(newest)
    assert says in str(caught.value) and "step-000010" in str(caught.value) and "earlier" in str(caught.value)
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 9
    assert damaged == [str(caught.value)]


def test_with_all_damaged_nothing_is_guessed(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left .*step-000002.*step-000001.*--overwrite"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])


def test_the_order_is_by_number_and_other_folders_do_not_count(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2):
        save(tmp_path, step)
    for other in ("step-", "step-1x", "damaged-step-000009", ".partial-step-000003"):
        (tmp_path / other).mkdir()
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [4, 5]), (1, 2, [2, 5]), (2, 5, [4, 5]), (9, None, [1, 2, 3, 4, 5])]
)
def test_the_newest_and_the_best_are_kept_and_leftovers_are_not(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / ".partial-step-000006" / "adapter").mkdir(parents=True)
    prune_checkpoints(tmp_path, keep, best)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_an_error_in_the_middle_leaves_no_checkpoint(tmp_path: Path) -> None:
    def stops(folder: Path) -> None:
        write_adapter(folder)
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, stops)
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None and found.state.step == 1 and damaged == []
    assert save(tmp_path, 2).name == "step-000002", "what was left of the first try is no obstacle"
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_whole_checkpoint_is_not_taken_away_to_be_written_again(tmp_path: Path) -> None:
    inode = save(tmp_path, 3).stat().st_ino
    assert save(tmp_path, 3).stat().st_ino == inode
    flip(tmp_path / "step-000003")
    assert read_checkpoint(save(tmp_path, 3)).state.step == 3, "a damaged one is"


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_leaves_earlier_checkpoints_whole(small_disk: Path) -> None:
    save(small_disk, 1)
    large = {"w/exp_avg": torch.zeros(300_000)}
    with pytest.raises(RunError, match=r"the disk is full while writing .*step-000002.* Free some space and try again"):
        save_checkpoint(small_disk, TrainState(step=2), write_adapter, large, {})
    assert names(small_disk) == ["step-000001"]
    assert read_checkpoint(small_disk / "step-000001").state.step == 1
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free))
    with pytest.raises(RunError, match="the disk is full"):  # as Python's own files tell it
        save(small_disk, 2)
    assert names(small_disk) == ["filler", "step-000001"]


def test_a_file_size_limit_in_a_run_is_told_and_healed(tmp_path: Path, tiny_llama: Path) -> None:
    """The same errors where no disk can be mounted: adapters fit below the limit, the optimizer's state does not."""
    whole = train_here(tiny_recipe(tmp_path, tiny_llama, run={"name": "whole"}))
    sizes = sorted(file.stat().st_size for file in whole.checkpoints.rglob("*") if file.is_file())
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama))
    run = tmp_path / "runs" / "tiny"
    limited = ForkedCli(tmp_path / "out", "train", recipe, "--quiet", file_limit_bytes=sizes[-1] - 1)
    assert limited.wait() == 2
    assert "step-000002 cannot be written: File too large" in limited.err and "--resume" in limited.err
    assert "Traceback" not in limited.err
    assert names(run / "checkpoints") == []
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    assert ForkedCli(tmp_path / "out", "train", "--resume", run, "--quiet").wait() == 0
    assert adapter_sha256(run) == adapter_sha256(whole.path)
