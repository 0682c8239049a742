"""Ctrl-C and SIGTERM leave a run that goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import ForkedCli, adapter_sha256, tiny_recipe, tiny_tree, train_here, write_recipe, write_rows

from qlora_kit.train.checkpoint import newest_checkpoint
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.signals import stop_signals


def wait_until(come: Callable[[], bool], process: ForkedCli) -> None:
    while not come():
        assert process.alive(), process.err
        time.sleep(0.001)


@pytest.fixture()
def started(tmp_path: Path, tiny_llama: Path) -> tuple[RunFolder, ForkedCli]:
    """A run under way, far from its end and from its first checkpoint."""
    tree = tiny_tree(tmp_path, tiny_llama, train={"max_steps": 12, "save_every": None, "eval_every": None})
    process = ForkedCli(tmp_path / "out", "train", write_recipe(tmp_path, tree))
    run = RunFolder(tmp_path / "runs" / "tiny")
    wait_until(lambda: len(run.metrics()) >= 2, process)
    return run, process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on(
    tmp_path: Path, tiny_llama: Path, started: tuple[RunFolder, ForkedCli], number: int
) -> None:
    run, process = started
    os.kill(process.pid, number)
    assert process.wait() == 130
    manifest = run.manifest()
    checkpoint, _ = newest_checkpoint(run.checkpoints)
    assert checkpoint is not None and manifest["status"] == "interrupted"
    step = checkpoint.state.step
    assert 2 <= step < 12 and manifest["step"] == step == run.metrics()[-1]["step"]
    assert f"stopped at step {step} of 12; a checkpoint is written" in process.err
    assert f"qlora-kit train --resume {run.path}" in process.err
    assert "Traceback" not in process.err
    assert ForkedCli(tmp_path / "out", "train", "--resume", run.path, "--quiet").wait() == 0
    recipe = run.recipe().model_dump(mode="json", by_alias=True)
    whole = train_here(tiny_recipe(tmp_path, tiny_llama, train=recipe["train"], run={"name": "whole"}))
    assert adapter_sha256(run.path) == adapter_sha256(whole.path)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path, tiny_llama: Path) -> None:
    """In an evaluation of hundreds of batches, which the first Ctrl-C would wait for."""
    write_rows(tmp_path / "eval.jsonl", 600, seed=5)
    train = {"max_steps": 4, "eval_every": 1, "eval_batches": None, "save_every": 1}
    tree = tiny_tree(tmp_path, tiny_llama, train=train, eval={"batch_size": 1})
    process = ForkedCli(tmp_path / "out", "train", write_recipe(tmp_path, tree))
    run = RunFolder(tmp_path / "runs" / "tiny")
    wait_until(lambda: len(run.metrics()) >= 1, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.1)
    assert process.alive(), "the first waits"
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert "stopped at once" in process.err and "--resume" in process.err
    assert run.manifest()["status"] == "interrupted"


def test_ctrl_c_while_the_adapter_is_published_stops_and_heals(tmp_path: Path, tiny_llama: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_llama, eval={"samples": 9, "max_new_tokens": 128})
    process = ForkedCli(tmp_path / "out", "train", write_recipe(tmp_path, tree))
    run = RunFolder(tmp_path / "runs" / "tiny")
    wait_until(run.adapter.is_dir, process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert "stopped at once" in process.err and not (run.path / "samples.json").exists()
    assert ForkedCli(tmp_path / "out", "train", "--resume", run.path, "--quiet").wait() == 0
    assert run.manifest()["status"] == "finished" and (run.path / "samples.json").is_file()


def test_signals_that_follow_at_once_are_one() -> None:
    """A launcher passes on the Ctrl-C that the terminal has sent to its processes already."""
    before = signal.getsignal(signal.SIGINT)  # a background job of a shell ignores it
    with stop_signals() as signals:
        assert not signals.wanted
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.wanted
        signals.at_once = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_catches_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, train={"max_steps": 1})
    thread = threading.Thread(target=train_here, args=(recipe,))
    thread.start()
    thread.join()
    assert RunFolder(tmp_path / "runs" / "tiny").manifest()["status"] == "finished"
