"""Runs with damaged checkpoints: they go on from what is whole, say so, and publish nothing that is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damages import DAMAGES, flip
from tiny_runs import RISING, ForkedCli, adapter_sha256, resume_here, tiny_recipe, train_here, write_gibberish

from qlora_kit.cli import main
from qlora_kit.train.checkpoint import newest_checkpoint


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


@pytest.mark.parametrize("damage", ["flipped bit", "torn hashes", "foreign format"])
def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    tmp_path: Path, tiny_llama: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, train={"eval_every": None, "keep_checkpoints": 2})
    run = train_here(recipe)
    expected, evaluation = adapter_sha256(run.path), [r for r in run.metrics() if r["kind"] == "eval"]
    DAMAGES[damage][0](run.checkpoints / "step-000006")
    shutil.rmtree(run.adapter)
    assert main(["train", "--resume", str(run.path)]) == 0
    told = capfd.readouterr().err
    assert "resumed at step 4" in told and "resumed from step 4: " in told
    assert any("step-000006" in note for note in run.manifest()["notes"])
    assert run.manifest()["resumes"] == [4]
    assert adapter_sha256(run.path) == expected
    assert [r for r in run.metrics() if r["kind"] == "eval"] == evaluation
    assert names(run.checkpoints) == ["damaged-step-000006", "step-000004", "step-000006"]


def test_a_damaged_newest_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path, tiny_llama: Path) -> None:
    """One is kept. Were the damaged one counted as the newest, the next save would leave nothing else."""
    every = {"eval_every": None, "save_every": 2}
    run = train_here(tiny_recipe(tmp_path, tiny_llama, train={**every, "keep_checkpoints": 4}))
    flip(run.checkpoints / "step-000006")
    shutil.rmtree(run.checkpoints / "step-000004")
    shutil.rmtree(run.adapter)
    save_at_4_then_die = ForkedCli(
        tmp_path / "out", "train", "--resume", run.path, "--quiet", "train.keep_checkpoints=1", die_at=40
    )
    assert save_at_4_then_die.wait() == -9
    found, damaged = newest_checkpoint(run.checkpoints)
    assert found is not None and found.state.step in (2, 4) and damaged == []


def test_a_damaged_best_checkpoint_is_never_published(tmp_path: Path, tiny_llama: Path) -> None:
    write_gibberish(tmp_path / "eval.jsonl")
    run = train_here(tiny_recipe(tmp_path, tiny_llama, train=RISING))
    best = run.manifest()["results"]["best_step"]
    assert best < 8, "the test needs a best step before the last"
    flip(run.checkpoints / f"step-{best:06d}")
    shutil.rmtree(run.adapter)
    resume_here(run)
    manifest = run.manifest()
    assert manifest["adapter"]["step"] == 8
    assert any("the best checkpoint cannot be published, step 8 is" in note for note in manifest["notes"])
    last = run.checkpoints / "step-000008" / "adapter" / "adapter_model.safetensors"
    assert last.read_bytes() == (run.adapter / last.name).read_bytes()
