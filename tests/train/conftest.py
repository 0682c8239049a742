"""What training sets for its whole process is set back after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_runs import tiny_recipe, train_here

from qlora_kit.train.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with an untied head and biases in attention."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "qwen2", arch="qwen2", tie=False)


@pytest.fixture()
def run(tmp_path: Path, tiny_llama: Path) -> RunFolder:
    """A run of 2 steps, finished."""
    return train_here(tiny_recipe(tmp_path, tiny_llama, train={"max_steps": 2, "eval_every": 1, "save_every": 1}))
