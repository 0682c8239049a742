"""Recipes as YAML 1.2 text: scalars, overrides, and the way back to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import changed_fields, dump_recipe, load_recipe, parse_recipe, recipe_hash, recipe_to_tree
from qlora_kit.task_settings import CausalLmSettings

SMALL = """\
run: {name: small}
base: {model: folder/model}
data: {train: rows.jsonl}
train: {max_steps: 10}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def load(recipe_file: Path, *overrides: str) -> Recipe:
    return load_recipe(str(recipe_file), list(overrides))


@pytest.mark.parametrize(
    "text, value",
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("1e-5", 1e-5),
        (".5", 0.5),
        ("+0.25", 0.25),
        ("1", 1.0),
        ("5.", None),  # read as 5.0, which is too much
    ],
)
def test_numbers_are_those_of_yaml_1_2(recipe_file: Path, text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(RecipeError, match=r"train\.lr: got 5\.0"):
            load(recipe_file, f"train.lr={text}")
    else:
        assert load(recipe_file, f"train.lr={text}").train.lr == value


@pytest.mark.parametrize("text, value", [("12", 12), ("007", 7), ("0x10", 16), ("0o17", 15), ("+3", 3)])
def test_integers_are_those_of_yaml_1_2(recipe_file: Path, text: str, value: int) -> None:
    assert load(recipe_file, f"run.seed={text}").run.seed == value


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "n", "1_000", "12:30:00", "2001-01-01", "tRue"])
def test_what_yaml_1_1_made_something_else_is_text(recipe_file: Path, text: str) -> None:
    assert load(recipe_file, f"data.system_prompt={text}").data.system_prompt == text


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), ("TRUE", True)])
def test_truth_values(recipe_file: Path, text: str, value: bool) -> None:
    assert load(recipe_file, f"base.double_quant={text}").base.double_quant is value


def test_overrides_reach_lists_maps_quotes_and_missing_sections(recipe_file: Path) -> None:
    recipe = load(
        recipe_file,
        "adapter.target_modules=[q_proj, v_proj]",
        "data.columns.prompt=question",
        "data.columns.completion=answer",
        'data.system_prompt="a: b # c = d"',
        "run.name='2024'",
        "base.revision=null",
        "train.max_steps=null",
        "train.epochs=1.5",
    )
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.data.columns == {"prompt": "question", "completion": "answer"}
    assert recipe.data.system_prompt == "a: b # c = d"
    assert (recipe.run.name, recipe.base.revision, recipe.train.epochs) == ("2024", None, 1.5)


def test_the_last_override_of_a_field_counts(recipe_file: Path) -> None:
    assert load(recipe_file, "train.lr=1e-3", "train.lr=1e-4").train.lr == 1e-4


AWKWARD = [
    "1e5",
    "0x10",
    "0o17",
    "no",
    "null",
    "~",
    "",
    " a ",
    "true",
    "12",
    "1.5",
    "a: b",
    "# a",
    "é 🙂\n\nb",
    "\t",
    "''",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_the_way_to_a_file_and_back(tmp_path: Path, text: str) -> None:
    tree: dict[str, Any] = {
        "run": {"name": "1e5"},
        "base": {"model": "0x10"},
        "data": {"train": [{"path": "007", "schema": "text", "weight": 0.5}], "system_prompt": text},
        "train": {"epochs": 1e-7, "lr": 1e-05},
    }
    recipe = parse_recipe(tree)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(str(path))
    assert again == recipe and again.data.system_prompt == text
    assert recipe_hash(again) == recipe_hash(recipe)


def test_a_dumped_recipe_names_every_field(recipe_file: Path) -> None:
    tree = recipe_to_tree(load(recipe_file))
    for section, field in Recipe.model_fields.items():
        default: Any = {"adapter": LoraSettings, "task": CausalLmSettings}
        model = default.get(section, field.annotation)
        names = {inner.alias or name for name, inner in model.model_fields.items()}
        assert set(tree[section]) == names


def test_the_hash_and_the_changes_see_every_field(recipe_file: Path) -> None:
    old, new = load(recipe_file), load(recipe_file, "train.lr=1e-3", "data.columns.prompt=q")
    assert recipe_hash(old) != recipe_hash(new)
    changes = changed_fields(recipe_to_tree(old), recipe_to_tree(new))
    assert changes == ["data.columns.prompt: None -> 'q'", "train.lr: 0.0002 -> 0.001"]


def test_a_recipe_cannot_be_changed_once_read(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(recipe_file).run.seed = 1  # type: ignore[misc]


def test_merge_keys_and_anchors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "run: {name: a}\nbase: {model: m}\n"
        "data: {train: [&one {path: a.jsonl, weight: 1}, {<<: *one, path: b.jsonl}]}\ntrain: {max_steps: 1}\n"
    )
    first, second = load_recipe(str(path)).data.sources()
    assert (first.path, first.weight, second.path, second.weight) == ("a.jsonl", 1, "b.jsonl", 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("run: {name: a, name: b}", "key given twice: name"),
        ("run: {name: a}\nbase: {}\nrun: {}", "key given twice: run"),
        ("run: [", "not valid YAML"),
        ("run:\n\t- a", "not valid YAML"),
        ("- a\n- b", "holds no recipe"),
        ("", "holds no recipe"),
        ("just text", "holds no recipe"),
        ("run: !!python/object:os.system {}", "not valid YAML"),
        ("run: !!int many", "not valid YAML"),
        ("run: " + "[" * 700, "not valid YAML"),
        ("run: {name: &a [*a]}", "recursive|wrong field"),
        ("? [a, b]\n: c", "not valid YAML"),
    ],
)
def test_text_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {name: \xe9}".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml is not valid YAML: .*utf-8"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lr", "not an override"),
        ("lr=1", "not an override"),
        ("=1", "not an override"),
        ("train..lr=1", "not an override"),
        ("train.=1", "not an override"),
        ("run.name.first=a", "name is not a section"),
        ("data.train.0.path=a", "train is not a section"),
        ("train.lr=[1", "not valid YAML.*Quote it"),
        ("train.lr={a: 1, a: 2}", "not valid YAML"),
    ],
)
def test_overrides_that_are_none(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe_file, override)


def test_no_such_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"no recipe nothing.*smollm2-gsm8k, smollm2-recommender, smollm2-sentiment"):
        load_recipe("nothing")
