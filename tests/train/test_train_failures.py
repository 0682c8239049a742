"""Errors that a run can meet half-way: they say what to do, and the run goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import adapter_sha256, resume_here, tiny_recipe, tiny_tree, train_here

from qlora_kit.errors import OutOfMemory, TrainingError
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.tasks.causal_lm import CausalLm
from qlora_kit.train.checkpoint import TrainState
from qlora_kit.train.failures import not_finite
from qlora_kit.train.progress import LiveProgress
from qlora_kit.train.records import gpu_peak_since_last, keep_peaks
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import Session, start_session


def fails_at_call(function: Any, number: int, always: bool = False) -> Any:
    """`function`, the memory running out at its `number`-th call."""
    calls = 0

    def called(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number or (always and calls > number):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*arguments)

    return called


def test_memory_that_runs_out_in_an_evaluation_is_told_with_what_to_do_and_the_run_goes_on(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the evaluation after step 6; see test_train_memory.py for a training step."""
    expected = adapter_sha256(train_here(tiny_recipe(tmp_path, tiny_llama, run={"name": "whole"})).path)
    with monkeypatch.context() as patch:
        patch.setattr(CausalLm, "row_losses", fails_at_call(CausalLm.row_losses, 3))
        with pytest.raises(OutOfMemory, match="too little memory on cpu after step 6") as caught:
            train_here(tiny_recipe(tmp_path, tiny_llama))
    run = RunFolder(tmp_path / "runs" / "tiny")
    parts = ["train.micro_batch_size=1 with train.grad_accum_steps=4", "train.gradient_checkpointing=true"]
    for part in (*parts, "data.max_seq_len below 120", "`qlora-kit plan`", f"--resume {run.path}"):
        assert part in str(caught.value)
    assert run.manifest()["status"] == "failed"
    resume_here(run)
    assert adapter_sha256(run.path) == expected and run.manifest()["status"] == "finished"


@pytest.mark.parametrize("stops", [False, True])
def test_rows_that_a_stream_leaves_out_are_counted_and_told(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    data = {"streaming": True, "shuffle_buffer": 8, "bad_rows": "skip"}
    tree = tiny_tree(tmp_path, tiny_llama, data=data)
    path = Path(tree["data"]["train"])
    rows = path.read_text().splitlines()
    rows[3] = json.dumps({"prompt": "stone", "completion": ""})
    path.write_text("\n".join(rows))
    if stops:
        monkeypatch.setattr(Session, "losses", fails_at_call(Session.losses, 7, always=True))
        with pytest.raises(OutOfMemory, match="too little memory"):
            train_here(parse_recipe(tree))
        monkeypatch.undo()
        manifest = RunFolder(tmp_path / "runs" / "tiny").manifest()
        assert sum(manifest["data"]["train"][0]["skipped"].values()) == 1
        resume_here(RunFolder(tmp_path / "runs" / "tiny"))
    else:
        train_here(parse_recipe(tree))
    manifest = RunFolder(tmp_path / "runs" / "tiny").manifest()
    (source,) = manifest["data"]["train"]
    assert source["read"] >= 24 and sum(source["skipped"].values()) >= 1
    told = [note for note in manifest["notes"] if "rows left out" in note]
    assert told == [f"{path}: {n} rows left out ({why})" for why, n in source["skipped"].items()]


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    """30 rows, 4 of them a step: 8 steps."""
    train = {"max_steps": None, "epochs": 1, "warmup_steps": 9}
    with pytest.raises(TrainingError, match=r"warmup_steps 9 is more than the 8 steps of the whole run"):
        train_here(tiny_recipe(tmp_path, tiny_llama, train=train))
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(("processes", "names"), [(2, "rows of another process"), (1, "train.jsonl row ")])
def test_a_process_does_not_blame_rows_that_are_right(
    tmp_path: Path, tiny_llama: Path, processes: int, names: str
) -> None:
    session = start_session(tiny_recipe(tmp_path, tiny_llama), RunFolder(tmp_path / "unused"))
    among: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=processes)
    rows = [session.batches.next_micro_batch()]
    error = not_finite(dataclasses.replace(session, accelerator=among), 3, float("nan"), 1.0, rows)
    assert names in str(error) and ("train.jsonl" in str(error)) == (processes == 1)


def test_gpu_memory_is_the_peak_since_the_last_line_and_the_largest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [5 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.append(2**30))
    state = TrainState()
    keep_peaks(state)
    assert [gpu_peak_since_last(state), gpu_peak_since_last(state)] == [5 * 2**30, 2**30]
    assert state.peak_gpu_bytes == 5 * 2**30


def test_gpu_memory_is_shown_where_there_is_some(capfd: pytest.CaptureFixture[str]) -> None:
    record = {"kind": "train", "step": 10, "loss": 1.0, "grad_norm": 1.0, "tokens_per_s": 9.0, "rss_bytes": 2**30}
    for gpu in (3 * 2**30, None):
        LiveProgress().show({**record, "gpu_bytes": gpu})
    with_gpu, without = capfd.readouterr().err.splitlines()
    assert with_gpu.endswith("1.00 GiB  GPU 3.00 GiB") and without.endswith("  1.00 GiB")
