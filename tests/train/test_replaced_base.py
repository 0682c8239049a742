"""Runs whose method replaces the base: the same codes after a resume and after loading, whatever the start drew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import resume_here, tiny_recipe, train_here
from torch import nn

from qlora_kit.adapters import svd_init
from qlora_kit.adapters.svd_init import SUBTRACTED
from qlora_kit.errors import CheckpointError
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.train.checkpoint import checkpoint_folder, checkpoint_folders, read_checkpoint
from qlora_kit.train.restore import load_run_base, load_tuned
from qlora_kit.train.session import start_session


def codes(model: nn.Module) -> list[bytes]:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return [buffer.reshape(-1).view(torch.uint8).numpy().tobytes() for layer in layers for buffer in layer.buffers()]


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_the_base_of_a_run_is_made_again(
    tmp_path: Path, tiny_llama: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, adapter={"method": method, "rank": 4, "new_tokens": ["<new>"]},
                         train={"max_steps": 2, "save_every": 1})  # fmt: skip
    run = train_here(recipe)
    trained_on = codes(start_session(recipe, run).plain)
    assert trained_on != codes(load_run_base(run))  # evaluation's base is the plain one

    def decomposed(*_: object) -> None:
        raise AssertionError("a stored base is not decomposed again")

    monkeypatch.setattr(svd_init, "best_factors", decomposed)
    assert codes(load_tuned(run)) == trained_on
    assert codes(start_session(recipe, run, resume=True).plain) == trained_on
    resume_here(run, recipe)


def test_every_checkpoint_and_the_adapter_hold_what_was_subtracted(tmp_path: Path, tiny_llama: Path) -> None:
    run = train_here(tiny_recipe(tmp_path, tiny_llama, adapter={"method": "pissa", "rank": 4},
                                 train={"max_steps": 2, "save_every": 1}))  # fmt: skip
    kept = {(folder / "adapter" / SUBTRACTED).read_bytes() for folder in checkpoint_folders(run.checkpoints)}
    assert kept == {(run.adapter / SUBTRACTED).read_bytes()}
    file = checkpoint_folder(run.checkpoints, 2) / "adapter" / SUBTRACTED
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"damaged: adapter/{SUBTRACTED} is not what was written"):
        read_checkpoint(file.parents[1])
