"""Every shipped recipe is read, planned, and run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import save_tiny_encoder, task_rows
from tiny_models import save_tiny_model, tiny_config
from tiny_run import label_rows, write_rows

from qlora_kit.cli import main
from qlora_kit.plan import plan
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import dump_recipe, load_recipe, shipped_recipes

SHIPPED = sorted(shipped_recipes())
SHORT = ("train.max_steps=2", "train.warmup_steps=1", "train.micro_batch_size=2", "train.grad_accum_steps=1")


def test_there_are_recipes() -> None:
    assert {"mistral-7b-laptop", "smollm2-gsm8k", "smollm2-sentiment"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_read_and_named_after_its_file(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.run.name == name
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_planned(name: str, device: str) -> None:
    result = plan(load_recipe(name), tiny_config("llama").to_dict(), device=device)
    assert json.loads(json.dumps(result.to_json()))


@pytest.mark.parametrize("name", SHIPPED)
def test_it_trains_a_tiny_model(name: str, tmp_path: Path) -> None:
    """The recipe as it stands, but for its model, its data and its length."""
    recipe = load_recipe(name)
    data = write_rows(tmp_path / "rows.jsonl", _rows(recipe))
    save = save_tiny_model if recipe.task.type == "causal_lm" else save_tiny_encoder
    places = [f"base.model={save(tmp_path / 'model')}", f"run.out_dir={tmp_path}", f"data.train={data}"]
    places += [f"data.eval={data}"] if recipe.data.eval else []
    places += ["train.epochs=null"] if recipe.train.epochs else []
    assert main(["train", name, *places, *SHORT, "eval.max_new_tokens=4", "--quiet"]) == 0
    manifest = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished" and manifest["step"] == 2


def _rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Some rows with the columns that the recipe's data has."""
    if recipe.task.type != "causal_lm":
        return task_rows(recipe.task.type, 24)
    alpaca = {"prompt": "instruction", "completion": "output"} if recipe.data.schema_ == "alpaca" else {}
    columns = {"prompt": "prompt", "completion": "completion"} | recipe.data.columns | alpaca
    labels = {"good": recipe.eval.choices[0], "bad": recipe.eval.choices[-1]} if recipe.eval.choices else {}
    return [
        {columns["prompt"]: row["prompt"], columns["completion"]: labels.get(row["completion"], "so 4 #### 4")}
        for row in label_rows(24)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith(("smollm2", "minilm"))])
def test_it_trains_the_real_model(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    needed = [path for path in (recipe.base.model, recipe.data.train, recipe.data.eval) if path]
    missing = [path for path in needed if not Path(str(path)).exists()]
    if missing:
        pytest.skip(f"not here: {', '.join(map(str, missing))} (make demo-data fetches the demo's)")
    short = ["train.max_steps=1", "train.warmup_steps=0", "train.micro_batch_size=1", "eval.samples=0"]
    short += ["train.epochs=null"] if recipe.train.epochs else []
    short += ["train.eval_every=null", "train.save_every=null"]
    assert main(["train", name, f"run.out_dir={tmp_path}", *short, "--quiet"]) == 0
