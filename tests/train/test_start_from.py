"""Training that starts from a finished LoRA: the same function at once, and every mismatch refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from tiny_run import killed_after, label_rows, train, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from qlora_kit.cli import main
from qlora_kit.model.source import sha256_file
from qlora_kit.train.checkpoint import read_checkpoint
from qlora_kit.train.run_folder import RunFolder

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def source_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return train(write_recipe(folder, save_tiny_model(folder / "model")))


def recipe_from(folder: Path, source: Path, model: Path, steps: int = 3, **adapter: Any) -> Path:
    """A run on other rows, that starts from `source`."""
    changes = {"rank": 4, "alpha": 32.0, "init_from": str(source), **adapter}
    options = {"max_steps": steps, "save_every": 1, "keep_checkpoints": 9}
    recipe = write_recipe(folder, model, adapter=changes, train=options)
    write_rows(folder / "train.jsonl", label_rows(48)[24:])
    return recipe


def model_of(run: Path) -> Path:
    return Path(RunFolder.open(run).recipe().base.model)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def first_loss(run: Path) -> float:
    return next(record["loss"] for record in RunFolder.open(run).metrics())


def test_a_run_goes_on_from_anothers_weights(tmp_path: Path, source_run: Path) -> None:
    run = train(recipe_from(tmp_path, source_run, model_of(source_run)))
    assert tensors_of(run / "checkpoints/step-000000/adapter").keys() == tensors_of(source_run / "adapter").keys()
    for name, tensor in tensors_of(run / "checkpoints/step-000000/adapter").items():
        assert torch.equal(tensor, tensors_of(source_run / "adapter")[name])
    fresh = train(write_recipe(tmp_path / "fresh", model_of(source_run)))
    assert first_loss(run) < first_loss(fresh)
    source = RunFolder.open(run).manifest()["init_from"]
    assert source["path"] == str(source_run) and source["rank"] == 4 and source["optimizer"] is False
    assert source["sha256"] == sha256_file(source_run / "adapter" / WEIGHTS)


def test_a_grown_start_is_the_same_function(tmp_path: Path, source_run: Path) -> None:
    same = train(recipe_from(tmp_path / "same", source_run, model_of(source_run), steps=1))
    grown = train(recipe_from(tmp_path / "grown", source_run, model_of(source_run), steps=1, rank=9, alpha=72.0))
    assert first_loss(grown) == first_loss(same)
    start = tensors_of(grown / "checkpoints/step-000000/adapter")
    for name, tensor in tensors_of(source_run / "adapter").items():
        kept, new = (start[name][:4], start[name][4:]) if "lora_A" in name else start[name].split([4, 5], dim=1)
        assert torch.equal(kept, tensor)
        assert new.any() == ("lora_A" in name)


@pytest.mark.parametrize("rank", [4, 6])
def test_optimizer_states_come_along(tmp_path: Path, source_run: Path, rank: int) -> None:
    alpha = 8.0 * rank
    options = {"rank": rank, "alpha": alpha, "init_optimizer": True}
    run = train(recipe_from(tmp_path, source_run, model_of(source_run), steps=1, **options))
    step = RunFolder.open(source_run).manifest()["adapter"]["step"]
    before = read_checkpoint(source_run / f"checkpoints/step-{step:06d}")
    after = read_checkpoint(run / "checkpoints/step-000000")
    assert after.optimizer_tensors.keys() == before.optimizer_tensors.keys()
    for name, old in before.optimizer_tensors.items():
        new = after.optimizer_tensors[name]
        shared = tuple(slice(size) for size in old.shape)
        assert torch.equal(new[shared], old)
        if name.endswith("exp_avg_sq"):
            grown = 0 if "lora_A" in name else 1  # new ones begin at the mean of the old ranks
            torch.testing.assert_close(new.mean(grown), old.mean(grown), rtol=1e-5, atol=0)
        else:
            assert new.count_nonzero() == old.count_nonzero()


def test_optimizer_states_of_another_dtype_are_refused(
    tmp_path: Path, source_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"dtype": "fp32", "init_optimizer": True}
    text = refused(capsys, recipe_from(tmp_path, source_run, model_of(source_run), **options))
    assert "was trained in bf16, and its states fit no other dtype; adapter.dtype (got 'fp32'). Allowed: bf16" in text
    assert "leave init_optimizer out to take the weights alone" in text
    run = train(recipe_from(tmp_path / "weights", source_run, model_of(source_run), steps=1, dtype="fp32"))
    assert tensors_of(run / "adapter").keys() == tensors_of(source_run / "adapter").keys()


def test_a_killed_run_needs_its_source_no_more(tmp_path: Path, source_run: Path) -> None:
    source = Path(shutil.copytree(source_run / "adapter", tmp_path / "source"))
    stages = [{"at": 0.5, "rank": 8}]
    whole = train(recipe_from(tmp_path / "whole", source, model_of(source_run), growth=stages))
    shutil.rmtree(source)
    for step in (0, 2):
        killed = killed_after(whole, step, tmp_path / f"killed{step}")
        assert main(["train", "--resume", str(killed), "--quiet"]) == 0
        assert (killed / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["q_proj", "embed_tokens"]])
def test_pefts_adapter_as_a_start(tmp_path: Path, targets: list[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.03125)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    options = {"rank": 4, "alpha": 12.0, "target_modules": targets, "dtype": "fp32"}
    run = train(recipe_from(tmp_path / "ours", tmp_path / "theirs", model, steps=1, **options))
    start = tensors_of(run / "checkpoints/step-000000/adapter")
    for name, tensor in tensors_of(tmp_path / "theirs").items():
        if "lora_" in name:
            assert torch.equal(start[name][tuple(slice(size) for size in tensor.shape)], tensor)


@pytest.mark.parametrize("module", ["norm", "lm_head"])  # the tied head stands for the embedding too
def test_modules_trained_in_full_go_on_under_the_names_they_were_given(tmp_path: Path, module: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    first = train(write_recipe(tmp_path / "first", model, adapter={"rank": 4, "modules_to_save": [module]}))
    again = train(recipe_from(tmp_path / "again", first, model, steps=1, modules_to_save=[module]))
    start = tensors_of(again / "checkpoints/step-000000/adapter")
    assert all(torch.equal(start[name], tensor) for name, tensor in tensors_of(first / "adapter").items())


def refused(capsys: pytest.CaptureFixture[str], recipe: Path) -> str:
    """The error of a run that does not start, and leaves nothing behind."""
    assert main(["train", str(recipe), "--quiet"]) == 2
    assert not (recipe.parent / "runs" / "tiny").exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"rank": 2, "alpha": 16.0}, "has rank 4 at model.layers.0.self_attn.q_proj, adapter.rank is smaller (got 2)"),
        ({"rank": 8}, "by another factor (got 4.0). Set adapter.alpha=64"),
        ({"modules_to_save": ["lm_head"]}, "trained in full (got ['model.embed_tokens', 'lm_head']). Allowed: []"),
        ({"target_modules": ["q_proj"]}, "adapts other layers, model.layers.0.mlp.down_proj in one of both alone"),
    ],
)
def test_an_adapter_that_does_not_fit(
    tmp_path: Path, source_run: Path, capsys: pytest.CaptureFixture[str], adapter: dict[str, Any], words: str
) -> None:
    assert words in refused(capsys, recipe_from(tmp_path, source_run, model_of(source_run), **adapter))


def test_another_base_is_named(tmp_path: Path, source_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    text = refused(capsys, recipe_from(tmp_path, source_run, other))
    assert f"was trained on {model_of(source_run)}, this run's base.model is {other}: their files differ" in text
    text = refused(capsys, recipe_from(tmp_path, source_run / "adapter", other))
    assert f"was trained on {model_of(source_run)}, this run's base.model is {other}. Set base.model=" in text


def test_a_source_that_cannot_be_used(tmp_path: Path, source_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(source_run)
    assert "adapter_config.json is missing" in refused(capsys, recipe_from(tmp_path, tmp_path / "none", model))
    adapter = Path(shutil.copytree(source_run / "adapter", tmp_path / "adapter"))
    text = refused(capsys, recipe_from(tmp_path, adapter, model, init_optimizer=True))
    assert "is no run. Allowed: a run's folder" in text
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "is of another method (got 'Dora'). Allowed: LoRA" in refused(capsys, recipe_from(tmp_path, adapter, model))
    unfinished = Path(shutil.copytree(source_run, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "adapter")
    assert "holds no adapter yet" in refused(capsys, recipe_from(tmp_path, unfinished, model))
