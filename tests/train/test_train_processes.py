"""Two processes train what one does with twice the rows, and leave one set of files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_runs import ForkedCli, adapter_sha256, tiny_recipe, tiny_tree, train_here, write_recipe
from torch.testing import assert_close

from qlora_kit.train.run_folder import RunFolder

EXACT = {"base": {"compute_dtype": "fp32"}, "adapter": {"dropout": 0.0, "dtype": "fp32"}}


def free_port() -> int:
    """Below the ports that outgoing connections are given: a rank that waits for the first could else reach itself."""
    for port in range(10_000 + os.getpid() % 10_000, 30_000):
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def launch(folder: Path, *arguments: Any) -> list[ForkedCli]:
    """Two processes with the environment that torchrun and accelerate give theirs."""
    port = str(free_port())
    return [
        ForkedCli(
            folder / f"rank{rank}",
            "train",
            *arguments,
            env={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]


def wait_for_all(processes: list[ForkedCli]) -> list[int]:
    return [process.wait() for process in processes]


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_the_loss_curve_is_that_of_one_process_with_twice_the_micro_batch(
    tmp_path: Path, tiny_llama: Path, quant: str
) -> None:
    exact = {"base": {**EXACT["base"], "quant": quant}, "adapter": EXACT["adapter"]}
    one = train_here(tiny_recipe(tmp_path, tiny_llama, run={"name": "one"}, train={"micro_batch_size": 4}, **exact))
    tree = tiny_tree(tmp_path, tiny_llama, run={"name": "two"}, **exact)
    processes = launch(tmp_path, write_recipe(tmp_path, tree), "--json")
    assert wait_for_all(processes) == [0, 0], processes[0].err + processes[1].err
    two = RunFolder(tmp_path / "runs" / "two")
    assert [(r["kind"], r["step"]) for r in two.metrics()] == [(r["kind"], r["step"]) for r in one.metrics()]
    for found, expected in zip(two.metrics(), one.metrics()):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["loss_tokens"] == expected["loss_tokens"]
        assert found.get("tokens") == expected.get("tokens")
        assert found.get("grad_norm", 0.0) == pytest.approx(expected.get("grad_norm", 0.0), abs=1e-4)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (two, one))
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)
    assert two.manifest()["machine"]["processes"] == 2
    final = [run.manifest()["results"]["final_eval_loss"] for run in (one, two)]
    assert final[0] == pytest.approx(final[1], abs=1e-5)
    printed = [json.loads(line)["kind"] for line in processes[0].out.splitlines()]
    assert printed[0] == "start" and printed[-1] == "finish" and processes[1].out == "", "one of them speaks"


def test_killed_together_and_resumed_they_end_in_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    whole = launch(tmp_path, write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama, run={"name": "whole"})), "--quiet")
    assert wait_for_all(whole) == [0, 0], whole[0].err
    processes = launch(tmp_path, write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama)), "--quiet")
    run = RunFolder(tmp_path / "runs" / "tiny")
    while len(run.metrics()) < 4:
        assert processes[0].alive(), processes[0].err
        time.sleep(0.001)
    for process in processes:
        process.kill()
    alone = ForkedCli(tmp_path / "out", "train", "--resume", run.path, "--quiet")
    assert alone.wait() == 2
    assert "was trained with 2 processes (got 1)" in alone.err and "Launch 2 processes" in alone.err
    assert wait_for_all(launch(tmp_path, "--resume", run.path, "--quiet")) == [0, 0]
    assert adapter_sha256(run.path) == adapter_sha256(tmp_path / "runs" / "whole")
    steps = [record["step"] for record in run.metrics() if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_signal_to_one_of_them_stops_both_at_the_same_step(tmp_path: Path, tiny_llama: Path) -> None:
    tree = tiny_tree(tmp_path, tiny_llama, train={"max_steps": 40, "eval_every": None})
    processes = launch(tmp_path, write_recipe(tmp_path, tree), "--quiet")
    run = RunFolder(tmp_path / "runs" / "tiny")
    while len(run.metrics()) < 2:
        assert processes[0].alive(), processes[0].err
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert wait_for_all(processes) == [130, 130]
    assert run.manifest()["status"] == "interrupted"
    assert processes[0].err.split(" of 40")[0] == processes[1].err.split(" of 40")[0]


@pytest.mark.slow
def test_torchrun_launches_the_command_line(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_tree(tmp_path, tiny_llama))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [*launcher, "-m", "qlora_kit.cli", "train", str(recipe), "--quiet"]
    subprocess.run(command, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert run.manifest()["status"] == "finished" and run.manifest()["machine"]["processes"] == 2
