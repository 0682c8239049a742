"""Same seed, same bits: a run killed at any moment and resumed ends in the adapter of one that never was."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    ForkedCli,
    adapter_sha256,
    resume_here,
    tiny_recipe,
    tiny_tree,
    train_here,
    write_recipe,
    write_rows,
)

from qlora_kit.train.checkpoint import checkpoint_folders
from qlora_kit.train.run_folder import RunFolder

LONG = {"max_steps": 20, "eval_every": 3, "save_every": 2, "early_stopping_patience": 9}
FORMS: dict[str, dict[str, Any]] = {
    "bf16, kept bits": {"base": {"compute_dtype": "bf16"}, "adapter": {"dtype": "bf16"}},
    "fp32": {"base": {"compute_dtype": "fp32"}, "adapter": {"dtype": "fp32"}},
    "fp16, scaled": {"base": {"compute_dtype": "fp16"}, "adapter": {"dtype": "fp32"}},
    "int8, checkpointing": {"base": {"quant": "int8"}, "train": {**LONG, "gradient_checkpointing": True}},
    "streamed": {"data": {"streaming": True, "shuffle_buffer": 8}},
    "two sources": {"data": {"train": "weighted"}},
}


def recipe_file(folder: Path, model: Path, name: str, form: str) -> Path:
    changes = {"train": LONG, **FORMS[form], "run": {"name": name}}
    if form == "two sources":
        paths = [write_rows(folder / f"part{k}.jsonl", 9 + 8 * k, seed=k) for k in range(2)]
        changes["data"] = {"train": [{"path": str(path), "weight": 1.0 + k} for k, path in enumerate(paths)]}
    write_rows(folder / "eval.jsonl", 40, seed=5)
    return write_recipe(folder, tiny_tree(folder, model, **changes))


def bookkeeping(run: RunFolder) -> tuple[Any, ...]:
    """What else must not depend on kills: the curve, what was best, and which checkpoints are left."""
    losses = [(r["kind"], r["step"], r["loss"], r.get("lr"), r.get("best")) for r in run.metrics()]
    manifest = run.manifest()
    results = [manifest["results"][key] for key in ("best_step", "best_eval_loss", "final_eval_loss", "stopped_early")]
    folders = [folder.name for folder in checkpoint_folders(run.checkpoints)]
    return losses, results, manifest["status"], manifest["step"], manifest["adapter"], folders


def waits_for(run: RunFolder, moment: str, number: int) -> Callable[[], bool]:
    """Whether the moment has come: so many lines of metrics; a checkpoint half written, or one more whole; an
    evaluation under way."""

    def lines() -> list[bytes]:
        try:
            return run.metrics_file.read_bytes().splitlines()
        except FileNotFoundError:
            return []

    def half_written() -> dict[str, int]:
        found = run.checkpoints.glob(".partial-*/adapter") if run.checkpoints.is_dir() else []
        return {str(folder): folder.stat().st_mtime_ns for folder in found if folder.exists()}

    def whole() -> set[str]:
        return {folder.name for folder in checkpoint_folders(run.checkpoints)} if run.checkpoints.is_dir() else set()

    left_by_an_earlier_kill, saved_before = half_written(), whole()

    def writing() -> bool:
        try:
            return bool(half_written().items() - left_by_an_earlier_kill.items())
        except FileNotFoundError:
            return False

    def evaluating() -> bool:
        found = lines()
        last = json.loads(found[-1]) if len(found) >= number and found[-1].endswith(b"}") else {}
        return last.get("kind") == "train" and last["step"] % LONG["eval_every"] == 0

    moments = {"writing": writing, "saved": lambda: bool(whole() - saved_before), "evaluating": evaluating}
    return {**moments, "lines": lambda: len(lines()) >= number}[moment]


def kill_when(process: ForkedCli, come: Callable[[], bool], delay_s: float) -> bool:
    """SIGKILL once the moment has come. False where the process ended before."""
    while process.alive():
        if come():
            time.sleep(delay_s)
            process.kill()
            return process.process.exitcode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


FEW = ("bf16, kept bits", "int8, checkpointing", "two sources")  # the others take as long again


@pytest.mark.parametrize(
    "form", [form if form in FEW else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_killed_at_random_moments_and_resumed_ends_in_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, form: str
) -> None:
    recipes = [recipe_file(tmp_path, tiny_llama, name, form) for name in ("whole", "again", "killed")]
    whole, _, run = (RunFolder(tmp_path / "runs" / path.stem) for path in recipes)
    others = [ForkedCli(tmp_path / path.stem, "train", path, "--quiet") for path in recipes[:2]]
    choose = random.Random(form)
    arguments: list[Any] = [recipes[2]]
    moments = ["writing", "saved", "evaluating", "saved", "lines"]
    kills = 0
    for k, moment in enumerate(moments):
        process = ForkedCli(tmp_path / "out", "train", *arguments, "--quiet")
        come = waits_for(run, moment, len(run.metrics()) + 2 + choose.randrange(2))
        kills += kill_when(process, come, choose.random() * 0.02)
        arguments = ["--resume", run.path] if run.recipe_file.exists() else arguments
        assert kills == k + 1, f"{moment}: ended before it could be killed: {process.err}"
    for process in (*others, ForkedCli(tmp_path / "out", "train", *arguments, "--quiet")):
        assert process.wait() == 0, process.err
    assert adapter_sha256(run.path) == adapter_sha256(whole.path)
    assert bookkeeping(run) == bookkeeping(whole)
    assert len(set(run.manifest()["resumes"])) >= 2, "checkpoints were gone on from, not only the start"
    assert adapter_sha256(tmp_path / "runs" / "again") == adapter_sha256(whole.path), "without any kill"


@pytest.mark.parametrize("part", range(2))
def test_a_kill_at_any_file_operation_heals(tmp_path: Path, tiny_llama: Path, part: int) -> None:
    """Dies at its n-th open, rename or removal in the run folder: begin, checkpoints, pruning, publishing, samples."""
    tree = tiny_tree(
        tmp_path, tiny_llama, train={"max_steps": 3, "eval_every": 1, "keep_checkpoints": 1}, eval={"samples": 1}
    )
    whole = train_here(tiny_recipe(tmp_path, tiny_llama, **{key: tree[key] for key in ("train", "eval")}))
    expected, books, samples = (
        adapter_sha256(whole.path),
        bookkeeping(whole),
        (whole.path / "samples.json").read_bytes(),
    )
    choose, events, died = random.Random(part), range(1, 170), 0
    for event in sorted(choose.sample(events, 6)):
        tree["run"]["name"] = f"at{event}"
        run = RunFolder(tmp_path / "runs" / f"at{event}")
        process = ForkedCli(tmp_path / "out", "train", write_recipe(tmp_path, tree), "--quiet", die_at=event)
        died += process.wait() == -signal.SIGKILL
        begun = run.recipe_file.exists()
        then = ["--resume", run.path] if begun else [tmp_path / f"at{event}.yaml"]
        last = ForkedCli(tmp_path / "out", "train", *then, "--quiet")
        assert last.wait() == 0, f"event {event}: {last.err}"
        assert adapter_sha256(run.path) == expected, event
        assert bookkeeping(run) == books, event
        assert (run.path / "samples.json").read_bytes() == samples, event
        assert not list(run.path.rglob("*partial*")), event
    assert died >= 4


def test_ten_kills_in_a_row_at_file_operations(tmp_path: Path, tiny_llama: Path) -> None:
    """Every resume is killed again, before or after its next checkpoint: what one leaves is no trap for the next."""
    whole = train_here(tiny_recipe(tmp_path, tiny_llama, train={"max_steps": 12}))
    tree = tiny_tree(tmp_path, tiny_llama, run={"name": "killed"}, train={"max_steps": 12})
    run = RunFolder(tmp_path / "runs" / "killed")
    arguments: list[Any] = [write_recipe(tmp_path, tree)]
    for event in (60, 20, 55, 35, 62, 45, 58, 8, 60, 50):
        process = ForkedCli(tmp_path / "out", "train", *arguments, "--quiet", die_at=event)
        assert process.wait() == -signal.SIGKILL, process.err
        arguments = ["--resume", run.path]
    assert ForkedCli(tmp_path / "out", "train", *arguments, "--quiet").wait() == 0
    assert adapter_sha256(run.path) == adapter_sha256(whole.path)
    assert bookkeeping(run) == bookkeeping(whole)
    assert len(set(run.manifest()["resumes"])) >= 4, "checkpoints were gone on from, not only the start"


def test_wall_time_adds_up_over_resumes(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama, train={"max_steps": 12, "save_every": 1}))
    run = RunFolder(tmp_path / "runs" / "tiny")
    started = time.monotonic()
    process = ForkedCli(tmp_path / "out", "train", recipe, "--quiet")
    assert kill_when(process, waits_for(run, "lines", 8), 0.0)
    first = run.metrics()[-2]["elapsed_s"]
    time.sleep(1.0)  # a pause between two sittings is not training
    resume_here(run)
    elapsed = [record["elapsed_s"] for record in run.metrics() if record["kind"] == "train"]
    assert elapsed == sorted(elapsed) and 0 < first < elapsed[-1]
    wall = run.manifest()["results"]["wall_s"]
    assert elapsed[-1] <= wall < time.monotonic() - started - 1.0
