"""Runs whose method replaces the base: the same codes after a resume and after loading, whatever the start drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import resume_here, tiny_recipe, train_here
from torch import nn

from qlora_kit.adapters import svd_init
from qlora_kit.adapters.inject import wanted_targets
from qlora_kit.adapters.input_moments import input_moments
from qlora_kit.adapters.settings import LoftqSettings
from qlora_kit.adapters.svd_init import SUBTRACTED, Loftq
from qlora_kit.errors import CheckpointError, RecipeError
from qlora_kit.model.load import load_base
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.recipe import Recipe
from qlora_kit.train.checkpoint import checkpoint_folder, checkpoint_folders, read_checkpoint
from qlora_kit.train.restore import load_run_base, load_tuned
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import Session, start_session


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


def start_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    session = start_session(recipe, RunFolder(Path(recipe.run.out_dir) / "unused"))
    return {name: weight.clone() for name, weight in adapter_weights(session)}


def adapter_weights(session: Session) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight.detach()) for name, weight in session.plain.named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("calibration", ["diagonal", "full"])
def test_loftq_is_fitted_to_training_rows(tmp_path: Path, tiny_llama: Path, calibration: str) -> None:
    """What it starts from is what fitting by hand to the same rows gives; another number of rows gives another."""
    loftq = {"method": "loftq", "rank": 4, "niter": 0, "dtype": "fp32", "calibration": calibration}
    recipe = tiny_recipe(tmp_path, tiny_llama, adapter={**loftq, "calibration_rows": 5}, train={"max_steps": 2})
    session = start_session(recipe, RunFolder(tmp_path / "unused"))
    plain = {**loftq, "calibration": "diagonal"}
    starts = {0: {**plain, "calibration_rows": 0}, 4: {**loftq, "calibration_rows": 4}}
    by_rows = {rows: start_of(tiny_recipe(tmp_path, tiny_llama, adapter=other)) for rows, other in starts.items()}
    assert isinstance(recipe.adapter, LoftqSettings)

    section = recipe.base
    base = load_base(session.source, section.quant, section.double_quant, session.plain.dtype, quantize_later=True)
    method = Loftq(recipe.adapter)
    rows = session.data.train
    batch = session.collate(rows[:: len(rows) // 5][:5])  # spread over all of them
    method.moments = input_moments(base, wanted_targets(base, recipe.adapter), [batch], calibration == "full")
    method.inject(base)
    expected = {name: weight.detach() for name, weight in base.named_parameters() if weight.requires_grad}
    found = dict(adapter_weights(session))
    assert set(found) == set(expected)
    changes = {rows: 0.0 for rows in by_rows}
    for name in (name for name in found if name.endswith("lora_B")):
        product, by_hand = (w[name] @ w[name.replace("lora_B", "lora_A")] for w in (found, expected))
        torch.testing.assert_close(product, by_hand, rtol=1e-3, atol=1e-5)
        for rows, start in by_rows.items():
            changes[rows] += float((start[name] @ start[name.replace("lora_B", "lora_A")] - product).norm())
    assert changes[0] > 1e-3 and changes[4] > 1e-4


def test_a_fitted_run_resumes_without_looking_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, adapter={"method": "loftq", "rank": 4, "calibration_rows": 4},
                         train={"max_steps": 2, "save_every": 1})  # fmt: skip
    run = train_here(recipe)
    trained_on = codes(start_session(recipe, run).plain)

    def looked(*_: object, **__: object) -> None:
        raise AssertionError("the inputs of a stored base are not looked at again")

    monkeypatch.setattr(svd_init, "input_moments", looked)
    assert codes(load_tuned(run)) == trained_on
    assert codes(start_session(recipe, run, resume=True).plain) == trained_on


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"streaming": True}}, "adapter.calibration_rows needs rows that are read first"),
        ({"adapter": {"method": "loftq", "calibration": "full"}}, "adapter.calibration: .*full needs rows to look at"),
        ({"task": {"type": "classification"}}, "adapter.calibration_rows needs task.type: causal_lm"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path, tiny_llama: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(tmp_path, tiny_llama, **{"adapter": {"method": "loftq", "calibration_rows": 4}, **changes})
