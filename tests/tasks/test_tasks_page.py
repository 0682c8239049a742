"""docs/tasks.md shows a recipe of six lines for each task."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from qlora_kit.eval.task_scores import texts
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.task_settings import TASKS
from qlora_kit.tasks.registry import TASK_CLASSES

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (\w+)\n\n```yaml\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_task_has_its_recipe() -> None:
    assert [heading for heading, _ in BLOCKS] == list(TASKS) and set(TASKS) == set(TASK_CLASSES)
    for heading, block in BLOCKS:
        assert len(block.splitlines()) == 6
        assert parse_recipe(yaml.safe_load(block)).task.type == heading


def test_the_table_names_the_auto_class_of_every_task() -> None:
    for name, task in TASK_CLASSES.items():
        assert re.search(rf"^\| `{name}` \| {task.auto_class.removeprefix('AutoModelFor')}\b", PAGE, flags=re.MULTILINE)


def test_the_table_names_the_scores_of_translations() -> None:
    [cells] = re.findall(r"^\| `seq2seq` \|.*\| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    said = {name.lower().replace(" ", "_") for name in cells.split(", ")}
    found = texts(["a"], ["a"]).scores
    assert said == {"rouge" if name.startswith("rouge") else name for name in found}
