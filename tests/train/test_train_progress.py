"""What a run tells while it trains: people, programs and trackers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import killed_after
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
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    first, *middle, last = (line for line in lines if line["kind"] != "note")
    assert (first["kind"], first["step"], first["total_steps"]) == ("start", 0, 6)
    assert any("torch AdamW with fp32 states takes its place" in note for note in first["notes"])
    assert [{key: value for key, value in line.items() if key != "eta_s"} for line in middle] == run.metrics()
    assert not any("eta_s" in record for record in run.metrics())
    left = [(line["step"], line["eta_s"], line["elapsed_s"]) for line in middle if line["kind"] == "train"]
    assert [eta for _, eta, _ in left] == [pytest.approx((6 - step) / step * elapsed) for step, _, elapsed in left]
    assert last["kind"] == "finish" and last["adapter"] == str(run.adapter)
    assert last["eval_loss"] == run.manifest()["results"]["final_eval_loss"]
    events = EventAccumulator(str(run.path / "trackers" / "qlora-kit"))
    events.Reload()
    for kind, names in {"train": ("loss", "lr", "grad_norm", "tokens_per_s"), "eval": ("loss", "perplexity")}.items():
        records: list[dict[str, Any]] = [record for record in run.metrics() if record["kind"] == kind]
        for name in names:
            logged = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            assert logged == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records], name


def test_the_time_left_of_a_resumed_run_is_at_its_own_pace(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama))
    assert main(["train", str(recipe), "--quiet"]) == 0
    run = RunFolder.open(killed_after(tmp_path / "runs" / "tiny", 4, tmp_path / "killed"))
    before = next(r["elapsed_s"] for r in run.metrics() if r["kind"] == "train" and r["step"] == 4)
    assert main(["train", "--resume", str(run.path), "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    five, six = (line for line in lines if line["kind"] == "train")
    assert six["eta_s"] == 0 and 0 < five["eta_s"] <= five["elapsed_s"] and before > 0


def records_of(path: Path) -> Iterator[Any]:
    """The records in a file of Weights & Biases: LevelDB's log format after 7 bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of the block is empty
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_weights_and_biases_offline_holds_the_same_curve(tmp_path: Path, tiny_llama: Path) -> None:
    pytest.importorskip("wandb")
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama, train={"trackers": ["wandb"]}))
    cli = ForkedCli(tmp_path / "out", "train", recipe, "--quiet", env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert cli.wait() == 0, cli.err
    run = RunFolder(tmp_path / "runs" / "tiny")
    (file,) = run.path.glob("trackers/wandb/offline-run-*/*.wandb")
    logged: dict[tuple[str, int], float] = {}
    for record in records_of(file):
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        logged |= {(key, values["_step"]): value for key, value in values.items() if "/" in key}
    expected = {
        (f"{record['kind']}/{key}", record["step"]): value
        for record in run.metrics()
        for key, value in record.items()
        if isinstance(value, float)
    }
    assert logged == pytest.approx(expected) and len(expected) > 30


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
