"""`qlora-kit data show` of tasks, and the split that keeps the shares of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_encoders import save_tiny_encoder, task_recipe, task_rows, tiny_wordpiece, write_jsonl

from qlora_kit.cli import main
from qlora_kit.data.dataset import held_out_mask, prepare
from qlora_kit.data.examples import split_key
from qlora_kit.data.task_schemas import TaskRowParser
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection
from qlora_kit.recipe_file import recipe_to_tree
from qlora_kit.task_settings import TASKS
from qlora_kit.tasks.registry import prepare_task, task_class

SHOWN = {
    "classification": ("[CLS] anna sold seven boats in lisbon [SEP] in lisbon [SEP]", "→ sold"),
    "regression": ("[CLS] anna sold seven boats in lisbon [SEP]", "→ 1"),
    "tagging": ("anna⟦B-PER⟧ sold seven boats in lisbon⟦B-LOC⟧",),
    "question_answering": ("[CLS] where? [SEP] anna sold seven boats in ⟦lisbon⟧ [SEP]",),
    "seq2seq": ("[CLS] anna sold seven boats in lisbon [SEP]", "→ [CLS] lisbon sold [SEP]"),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_rows_are_shown_with_what_is_learned(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_encoder(tmp_path / "model", "t5" if kind == "seq2seq" else "bert")
    recipe = task_recipe(tmp_path, model, {"type": kind})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_tree(recipe)), encoding="utf-8")
    assert main(["data", "show", str(path), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert all(line in out.splitlines() for line in SHOWN[kind])
    assert "Chat template" not in out and "carries loss" not in out


def labelled(path: Path, labels: list[str]) -> DataSection:
    rows = [{"text": f"row {k}", "label": label} for k, label in enumerate(labels)]
    return DataSection.model_validate({"train": str(write_jsonl(path, rows)), "eval_fraction": 0.1})


def test_held_out_rows_keep_the_shares_of_labels(tmp_path: Path) -> None:
    section = labelled(tmp_path / "rows.jsonl", ["often"] * 60 + ["rare"] * 20 + ["twice"] * 2)
    task = prepare_task(TASKS["classification"].model_validate({}), section)
    data = prepare(section, tiny_wordpiece(), 0, task)
    of_label = {label: 0 for label in task.labels}
    for row in data.eval:
        of_label[task.labels[row.labels[0]]] += 1
    assert of_label == {"often": 6, "rare": 2, "twice": 1}
    assert len(data.train) + len(data.eval) == 82
    again = prepare(section, tiny_wordpiece(), 0, task)
    assert [row.row for row in again.eval] == [row.row for row in data.eval]


def test_rare_tags_are_on_both_sides(tmp_path: Path) -> None:
    rows = [{"words": ["x", str(k)], "tags": ["B-ODD" if k < 2 else "O", "O"]} for k in range(40)]
    section = DataSection.model_validate({"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))})
    task = prepare_task(TASKS["tagging"].model_validate({}), section)
    data = prepare(section, tiny_wordpiece(), 0, task)
    odd = task.ids["B-ODD"]
    assert any(odd in row.labels for row in data.eval) and any(odd in row.labels for row in data.train)


def test_rows_without_labels_are_split_by_their_key_alone(tmp_path: Path) -> None:
    rows, settings = task_rows("seq2seq", 24), TASKS["seq2seq"].model_validate({})
    section = DataSection.model_validate({"train": str(write_jsonl(tmp_path / "r.jsonl", rows)), "eval_fraction": 0.3})
    data = prepare(section, tiny_wordpiece("bart"), 5, prepare_task(settings, section))
    parser = TaskRowParser(settings, section, section.sources()[0])
    keys = np.array([split_key(parser.parse(k, row), 5) for k, row in enumerate(rows, 1)], dtype=np.uint64)
    assert [row.row - 1 for row in data.eval] == np.flatnonzero(held_out_mask(keys, 0.3)).tolist()


def test_equal_texts_cannot_be_held_out(tmp_path: Path) -> None:
    rows = [{"text": "the same", "label": label} for label in "abab"]
    section = DataSection.model_validate({"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))})
    task = prepare_task(TASKS["classification"].model_validate({}), section)
    with pytest.raises(DataError, match="no label has two different texts: none can be held out"):
        prepare(section, tiny_wordpiece(), 0, task)


@pytest.mark.parametrize(
    ("bad_rows", "message"),
    [
        ("error", r"^\S+rows\.conll row 1: tags\[0\] of 'EU' is I-ORG after O: the span has no beginning.*repair"),
        ("skip", r"1 tags: nothing to tell apart.*2 rows are left out, the first: \S+rows\.conll row 1: tags\[0\] of"),
    ],
)
def test_wrong_rows_are_named_where_they_leave_no_labels(tmp_path: Path, bad_rows: str, message: str) -> None:
    (tmp_path / "rows.conll").write_text("EU I-ORG\nsays O\n\nBonn I-LOC\n\nso O\n", encoding="utf-8")  # IOB1
    section = DataSection.model_validate({"train": str(tmp_path / "rows.conll"), "bad_rows": bad_rows})
    with pytest.raises(DataError, match=message):
        prepare_task(TASKS["tagging"].model_validate({}), section)


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_has_its_class(kind: str) -> None:
    settings: Any = TASKS[kind].model_validate({})
    assert task_class(settings).auto_class.startswith("AutoModelFor")
