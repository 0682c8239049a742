"""A resume goes on with the same run only: recipe, data, base model, threads and checkpoints as they were."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damages import rewrite_state
from tiny_runs import (
    ForkedCli,
    adapter_sha256,
    contents,
    resume_here,
    tiny_recipe,
    tiny_tree,
    train_here,
    unfinish,
    write_recipe,
)

from qlora_kit.errors import CheckpointError, RunError
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.checkpoint import newest_checkpoint
from qlora_kit.train.run_folder import RunFolder

REFUSED = {
    "run.seed=8": "run.seed: 7 -> 8",
    "base.quant=fp4": "base.quant: 'nf4' -> 'fp4'",
    "base.compute_dtype=bf16": "base.compute_dtype: 'fp32' -> 'bf16'",
    "adapter.rank=8": "adapter.rank: 4 -> 8",
    "adapter.dropout=0.0": "adapter.dropout: 0.1 -> 0.0",
    "adapter.keep_precision=false": "adapter.keep_precision: True -> False",
    "data.max_seq_len=64": "data.max_seq_len: 120 -> 64",
    "data.train_on=all": "data.train_on: 'assistant' -> 'all'",
    "train.lr=0.5": "train.lr: 0.01 -> 0.5",
    "train.max_steps=9": "train.max_steps: 2 -> 9",
    "train.micro_batch_size=4": "train.micro_batch_size: 2 -> 4",
    "train.eval_every=2": "train.eval_every: 1 -> 2",
    "eval.batch_size=1": "eval.batch_size: 4 -> 1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_resume_with_another_recipe_names_the_field_with_both_values(run: RunFolder, override: str) -> None:
    section, _, rest = override.partition(".")
    field, _, text = rest.partition("=")
    tree = run.recipe().model_dump(mode="json", by_alias=True)
    tree[section][field] = yaml.safe_load(text)
    unfinish(run)
    before = contents(run.path)
    with pytest.raises(RunError, match="cannot be resumed with a changed recipe") as caught:
        resume_here(run, parse_recipe(tree))
    assert REFUSED[override] in str(caught.value)
    assert contents(run.path) == before


def test_the_command_line_refuses_the_same_way(tmp_path: Path, run: RunFolder) -> None:
    process = ForkedCli(tmp_path / "out", "train", "--resume", run.path, "train.lr=0.5", "run.seed=8")
    assert process.wait() == 2
    assert "run.seed: 7 -> 8; train.lr: 0.01 -> 0.5" in process.err


def test_changes_that_move_no_bit_are_taken_over(run: RunFolder) -> None:
    expected = adapter_sha256(run.path)
    unfinish(run)
    tree = run.recipe().model_dump(mode="json", by_alias=True)
    tree["train"] |= {"keep_checkpoints": 5, "save_every": 7, "log_every": 2}
    tree["eval"] |= {"max_rows": 3, "samples": 1}
    tree["export"] |= {"profiles": ["int8"]}
    changed = parse_recipe(tree)
    resume_here(run, changed)
    assert adapter_sha256(run.path) == expected
    assert run.recipe() == changed
    assert len(json.loads((run.path / "samples.json").read_text())) == 1


def test_a_resume_with_other_data_is_refused(tmp_path: Path, run: RunFolder) -> None:
    unfinish(run)
    for name in ("train", "eval"):
        path = tmp_path / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(before.replace("bridge", "bridges", 1))
        with pytest.raises(CheckpointError, match=r"step-000002 was trained on other data .*changed: .*jsonl"):
            resume_here(run)
        path.write_text(before)
    resume_here(run)


def test_a_resume_with_another_base_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    run = train_here(tiny_recipe(tmp_path, model, train={"max_steps": 1}))
    unfinish(run)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was trained on another base model than base\.model now holds"):
        resume_here(run)


def test_a_resume_with_another_number_of_threads_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, train={"max_steps": 1, "threads": None})
    run = train_here(recipe)
    unfinish(run)
    torch.set_num_threads(2)
    with pytest.raises(CheckpointError, match=r"was trained with 1 threads \(got 2\).*Set train\.threads=1"):
        resume_here(run)


def test_the_advice_on_threads_is_one_that_can_be_followed(tmp_path: Path, tiny_llama: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_llama, train={"max_steps": 2, "threads": None})
    recipe = write_recipe(tmp_path, tree)
    assert ForkedCli(tmp_path / "one", "train", recipe, "--quiet", "train.threads=1").wait() == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    expected = adapter_sha256(run.path)
    unfinish(run)
    refused = ForkedCli(tmp_path / "two", "train", "--resume", run.path, "--quiet", "train.threads=2")
    assert refused.wait() == 2
    advice = re.search(r"Set (train\.threads=\d+)", " ".join(refused.err.split()))
    assert advice is not None, refused.err
    followed = ForkedCli(tmp_path / "three", "train", "--resume", run.path, "--quiet", advice[1])
    assert followed.wait() == 0, followed.err
    assert adapter_sha256(run.path) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, r"was trained on cuda, this is cpu: optimizer states differ"),
        ({"micro_batch_size": 4}, r"with 4 rows a micro batch \(got 2\).*Set train\.micro_batch_size=4"),
        ({"grad_accum_steps": 3}, r"with 3 micro batches a step \(got 2\).*Set train\.grad_accum_steps=3"),
    ],
)
def test_a_checkpoint_made_in_another_way_is_refused(run: RunFolder, changes: dict[str, Any], message: str) -> None:
    unfinish(run)
    assert newest_checkpoint(run.checkpoints)[0].state.device == "cpu"  # type: ignore[union-attr]
    rewrite_state(run.checkpoints / "step-000002", **changes)
    with pytest.raises(CheckpointError, match=message):
        resume_here(run)


def test_a_checkpoint_that_names_no_device_is_taken(run: RunFolder) -> None:
    expected = adapter_sha256(run.path)
    unfinish(run)
    rewrite_state(run.checkpoints / "step-000002", device=None)
    resume_here(run)
    assert adapter_sha256(run.path) == expected


def test_a_resume_with_other_library_versions_says_so(run: RunFolder) -> None:
    unfinish(run)
    run.update_manifest(tools={**run.manifest()["tools"], "torch": "1.0"})
    resume_here(run)
    assert any("begun with 1.0: bits may differ" in note for note in run.manifest()["notes"])


def test_a_resume_before_the_first_checkpoint_begins_again(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama)
    expected = adapter_sha256(train_here(recipe).path)
    killed = tmp_path / "killed"
    killed.mkdir()
    tree = tiny_tree(tmp_path, tiny_llama, run={"name": "early", "out_dir": str(tmp_path / "runs")})
    process = ForkedCli(killed, "train", write_recipe(tmp_path, tree), "--quiet", die_at=45)
    assert process.wait() == -9
    run = RunFolder.open(tmp_path / "runs" / "early")
    assert not list(run.path.glob("checkpoints/step-*"))
    run.append_metrics({"kind": "train", "step": 1, "loss": 0.0})
    resume_here(run)
    assert adapter_sha256(run.path) == expected
    assert [r["step"] for r in run.metrics() if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_lost_checkpoints_are_not_a_fresh_start(run: RunFolder) -> None:
    unfinish(run)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint, and the run had written one at step 2"):
        resume_here(run)
    assert len(run.metrics()) == 4, "nothing was forgotten"


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, run: RunFolder) -> None:
    before = contents(run.path)
    process = ForkedCli(tmp_path / "out", "train", "--resume", run.path)
    assert process.wait() == 0
    assert "is finished: nothing is left to do" in process.err
    after = contents(run.path)
    after.pop("report.html")
    assert after == before


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_finished_run_whose_adapter_is_lost_publishes_it_again(run: RunFolder, damage: str) -> None:
    expected = adapter_sha256(run.path)
    weights = run.adapter / "adapter_model.safetensors"
    shutil.rmtree(run.adapter) if damage == "gone" else weights.write_bytes(weights.read_bytes()[:-1])
    resume_here(run)
    assert adapter_sha256(run.path) == expected == run.manifest()["adapter"]["sha256"]


def test_a_torn_metrics_line_and_later_steps_are_forgotten(run: RunFolder) -> None:
    whole = run.metrics()
    unfinish(run)
    with run.metrics_file.open("ab") as file:
        file.write(b'{"kind": "train", "step": 3, "loss": 1.0}\n{"kind": "train", "step": 4, "lo\xff\x00')
    assert [record["step"] for record in run.metrics()] == [1, 1, 2, 2, 3]
    resume_here(run)
    assert run.metrics() == whole
