"""What a run tells while it trains: people, programs and trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ForkedCli, adapter_sha256, tiny_tree, write_recipe

from qlora_kit.cli import main
from qlora_kit.train.run_folder import RunFolder


def test_json_lines_are_the_metrics_and_tensorboard_holds_the_same_curve(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama, train={"trackers": ["tensorboard"]}))
    assert main(["train", str(recipe), "--json"]) == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    first, *middle, last = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (first["kind"], first["step"], first["total_steps"]) == ("start", 0, 6)
    assert any("torch AdamW with fp32 states takes its place" in note for note in first["notes"])
    assert middle == run.metrics()
    assert last["kind"] == "finish" and last["adapter"] == str(run.adapter)
    assert last["eval_loss"] == run.manifest()["results"]["final_eval_loss"]
    events = EventAccumulator(str(run.path / "trackers" / "qlora-kit"))
    events.Reload()
    for kind, names in {"train": ("loss", "lr", "grad_norm", "tokens_per_s"), "eval": ("loss", "perplexity")}.items():
        records: list[dict[str, Any]] = [record for record in run.metrics() if record["kind"] == kind]
        for name in names:
            logged = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            assert logged == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records], name


def test_quiet_is_silent_and_the_default_tells_what_matters(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama))
    quiet = ForkedCli(tmp_path / "quiet", "train", recipe, "--quiet")
    assert quiet.wait() == 0 and quiet.out == "" and quiet.err == ""
    expected = adapter_sha256(tmp_path / "runs" / "tiny")
    assert main(["train", str(recipe), "--overwrite"]) == 0
    told = capfd.readouterr()
    assert told.out == ""
    parts = [
        "nf4 base, 7,520 trained weights, 6 steps",
        "note: optimizer paged_adamw_8bit needs CUDA",
        "step 3: eval loss",
    ]
    for part in (*parts, "(best)", "step 6/6  loss", "holds the adapter of step 6, eval loss"):
        assert part in told.err, part
    assert f"6 steps, into {tmp_path / 'runs' / 'tiny'}\n" in told.err, "lines in a log file are not wrapped"
    assert adapter_sha256(tmp_path / "runs" / "tiny") == expected
