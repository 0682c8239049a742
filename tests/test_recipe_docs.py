"""docs/recipe.md says what the recipe's models say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from qlora_kit.adapters.settings import SETTINGS
from qlora_kit.recipe import DataSource, Recipe
from qlora_kit.task_settings import TASKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    render = runpy.run_path(str(ROOT / "scripts" / "write_recipe_docs.py"))["render"]
    assert render() == PAGE, "docs/recipe.md is out of date: run python scripts/write_recipe_docs.py"


def test_every_field_has_a_row_with_a_meaning() -> None:
    unions = ("adapter", "task")
    models: list[Any] = [field.annotation for name, field in Recipe.model_fields.items() if name not in unions]
    for model in [*models, DataSource, *SETTINGS.values(), *TASKS.values()]:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            assert f"| `{field.alias or name}` | " in PAGE


def test_every_value_and_default_is_in_words() -> None:
    for word in ("Annotated", "FieldInfo", "typing.", "NoneType", "PydanticUndefined", "<class"):
        assert word not in PAGE
