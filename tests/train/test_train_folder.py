"""The run folder: one process at a time, no run lost or half begun, and a resume only of the same run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    ForkedCli,
    contents,
    resume_here,
    tiny_recipe,
    tiny_tree,
    train_here,
    unfinish,
    write_recipe,
    write_rows,
)

from qlora_kit.errors import AdapterError, DataError, ModelError, RunError
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.run_folder import RunFolder


def test_a_run_folder_is_in_use_by_one_process_at_a_time(tmp_path: Path, run: RunFolder) -> None:
    unfinish(run)
    with run.lock():
        other = ForkedCli(tmp_path / "out", "train", "--resume", run.path, "--quiet")
        assert other.wait() == 2
        assert f"{run.path} is in use by another process" in other.err
    assert ForkedCli(tmp_path / "out", "train", "--resume", run.path, "--quiet").wait() == 0


def test_a_new_run_is_refused_where_another_process_begins_one(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama))
    folder = RunFolder(tmp_path / "runs" / "tiny")
    with folder.lock():
        other = ForkedCli(tmp_path / "out", "train", recipe, "--quiet")
        assert other.wait() == 2
        assert "in use by another process" in other.err
        assert [entry.name for entry in folder.path.iterdir()] == [".lock"]


def test_an_existing_run_is_not_overwritten_unasked(run: RunFolder) -> None:
    before = contents(run.path)
    with pytest.raises(RunError, match=r"holds a run already\. Go on with it by --resume, start again by --overwrite"):
        train_here(run.recipe())
    assert contents(run.path) == before


def test_overwrite_leaves_nothing_of_the_old_run_and_everything_that_is_not_a_runs(run: RunFolder) -> None:
    made, own = ("samples.json", "eval/results.json", "bundles/fp32/model.onnx", "merge.json"), ("notes.txt", "mine/a")
    for name in (*made, *own):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("old")
    recipe = run.recipe()
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree["train"]["max_steps"] = 1
    train_here(parse_recipe(tree), overwrite=True)
    left = contents(run.path)
    assert {name for name, content in left.items() if content == b"old"} == set(own)
    assert [r["step"] for r in run.metrics() if r["kind"] == "train"] == [1]
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-000001"]


WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "data": ({"data": {"train": "nowhere.jsonl"}}, DataError),
    "model": ({"base": {"model": "./nowhere"}}, ModelError),
    "target": ({"adapter": {"target_modules": ["no_proj"]}}, AdapterError),
    "tracker": ({"train": {"trackers": ["wandb"]}}, RunError),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_run_that_cannot_start_leaves_no_trace(
    tmp_path: Path, tiny_llama: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "tracker":
        monkeypatch.setitem(sys.modules, "wandb", None)  # how Python itself is told that there is no such module
    changes, error = WRONG[what]
    with pytest.raises(error):
        train_here(tiny_recipe(tmp_path, tiny_llama, **changes))
    assert not (tmp_path / "runs" / "tiny").exists()
    assert train_here(tiny_recipe(tmp_path, tiny_llama, train={"max_steps": 1})).adapter.is_dir(), (
        "no --overwrite needed"
    )


@pytest.mark.parametrize("what", ["data", "model", "target"])
def test_an_overwrite_that_cannot_start_keeps_the_old_run(run: RunFolder, tmp_path: Path, what: str) -> None:
    before = contents(run.path)
    changes, error = WRONG[what]
    with pytest.raises(error):
        train_here(tiny_recipe(tmp_path, Path(run.recipe().base.model), **changes), overwrite=True)
    assert contents(run.path) == before


def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, run: RunFolder) -> None:
    run.manifest_file.write_text('{"status": "runn')
    with pytest.raises(RunError, match=r"manifest\.json is not JSON"):
        resume_here(run)
    assert ForkedCli(tmp_path / "out", "train", "--resume", run.path).wait() == 2


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match=r"runs/tiny cannot be written"):
        train_here(tiny_recipe(tmp_path, tiny_llama))


def test_no_held_out_row_is_an_error_before_anything_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", 1)
    with pytest.raises(DataError, match="none can be held out"):
        train_here(tiny_recipe(tmp_path, tiny_llama, data={"train": str(one), "eval": None}))
    assert not (tmp_path / "runs" / "tiny").exists()
