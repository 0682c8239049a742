"""Every shipped recipe is read, planned, and run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import save_tiny_encoder, task_rows
from tiny_models import save_tiny_model, tiny_config
from tiny_run import label_rows, write_rows

from qlora_kit.cli import main
from qlora_kit.data.task_readers.parallel import parallel_files
from qlora_kit.options import parse_options
from qlora_kit.plan import plan
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import dump_recipe, load_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SHIPPED = sorted(shipped_recipes())
SHORT = ("train.max_steps=2", "train.warmup_steps=1", "train.micro_batch_size=2", "train.grad_accum_steps=1")


def test_there_are_recipes() -> None:
    assert {"mistral-7b-laptop", "smollm2-gsm8k", "smollm2-sentiment"} <= set(SHIPPED)


def test_each_has_its_place_on_the_page() -> None:
    assert sorted(re.findall(r"^\| \[`([\w-]+)`\]", PAGE, re.M)) == SHIPPED, "docs/recipes.md: a row of its table each"
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
    for name in SHIPPED:
        assert f"qlora-kit train {name}" in sections[name]


def test_the_page_names_commands_that_there_are() -> None:
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
    for line in lines:
        tool, *arguments = shlex.split(line, comments=True)
        if tool == "qlora-kit":
            parse_options(arguments)
        else:
            assert tool == "python" and (ROOT / arguments[0]).is_file(), line
    assert len(lines) > len(SHIPPED)


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
    data = _data(recipe, tmp_path)
    save = save_tiny_model if recipe.task.type == "causal_lm" else save_tiny_encoder
    places = [f"base.model={save(tmp_path / 'model')}", f"run.out_dir={tmp_path}", f"data.train={data}"]
    places += [f"data.eval={data}"] if recipe.data.eval else []
    places += ["train.epochs=null"] if recipe.train.epochs else []
    assert main(["train", name, *places, *SHORT, "eval.max_new_tokens=4", "--quiet"]) == 0
    manifest = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished" and manifest["step"] == 2


def _data(recipe: Recipe, folder: Path) -> str:
    """Some rows in a file of the recipe's kind, or in two of parallel text."""
    if parallel_files(str(recipe.data.train)) is None:
        return str(write_rows(folder / "rows.jsonl", _rows(recipe)))
    for side, ending in (("source", "en"), ("target", "de")):
        lines = "".join(f"{row[side]}\n" for row in task_rows("seq2seq", 24))
        (folder / f"rows.{ending}").write_text(lines, encoding="utf-8")
    return str(folder / "rows.{en,de}")


def _rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Some rows with the columns that the recipe's data has."""
    if recipe.task.type != "causal_lm":
        return task_rows(recipe.task.type, 24)
    if recipe.data.schema_ == "text":
        return [{"text": f"{row['prompt']} {row['completion']}"} for row in label_rows(24)]
    if recipe.data.schema_ == "messages":
        pairs = [(row["prompt"], row["completion"]) for row in label_rows(24)]
        return [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] * 2}
            for asked, said in pairs
        ]
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
    needed = [Path(recipe.base.model)]
    for path in (recipe.data.train, recipe.data.eval):
        needed += [*(parallel_files(str(path)) or [Path(str(path))])] if path else []
    missing = [path for path in needed if not path.exists()]
    if missing:
        pytest.skip(f"not here: {', '.join(map(str, missing))} (make demo-data fetches the demo's)")
    short = ["train.max_steps=1", "train.warmup_steps=0", "train.micro_batch_size=1", "eval.samples=0"]
    short += ["train.epochs=null"] if recipe.train.epochs else []
    short += ["train.eval_every=null", "train.save_every=null"]
    assert main(["train", name, f"run.out_dir={tmp_path}", *short, "--quiet"]) == 0
