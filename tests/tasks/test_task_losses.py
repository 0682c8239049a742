"""The losses of the text tasks: transformers' own in fp32, and the same however rows are batched."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import ENCODER_DECODERS, ENCODERS, task_rows, tiny_encoder, tiny_wordpiece
from torch import Tensor

from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_examples import LabelledText
from qlora_kit.data.task_schemas import TaskRowParser
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.task_settings import TASKS
from qlora_kit.tasks.registry import task_of
from qlora_kit.tasks.task import Task

SECTION = DataSection.model_validate({"train": "rows.jsonl", "max_seq_len": 64})
ON_ENCODERS = ("classification", "regression", "tagging", "question_answering")
CASES = [*product(ENCODERS, ON_ENCODERS), *product(ENCODER_DECODERS, ["seq2seq"])]


def made(kind: str, name: str, count: int = 7) -> tuple[Task[Any], Any, list[Encoded]]:
    """A task with its labels, a tiny model for it, and rows of different lengths."""
    settings = TASKS[name].model_validate({})
    parser = TaskRowParser(settings, SECTION, DataSource(path="rows.jsonl"))
    examples = [parser.parse(number, row) for number, row in enumerate(task_rows(name, count), 1)]
    task = task_of(settings, [])
    if task.has_labels:
        task = task_of(settings, task.find_labels(examples))
    tokenizer = tiny_wordpiece(kind)
    rows = [row for example in examples for row in task.encode(example, tokenizer, SECTION)]
    return task, tiny_encoder(kind, task.auto_class, **task.config()), rows


def own_loss(name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    if name != "question_answering":
        return model(**batch).loss
    places = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return model(**{key: value for key, value in batch.items() if key != "labels"}, **places).loss


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_mean_is_transformers_own_loss(kind: str, name: str) -> None:
    task, model, rows = made(kind, name)
    batch = task.collate(rows, tiny_wordpiece(kind))
    if name == "question_answering":  # theirs spreads over padding too: the longest rows, without it
        lengths = batch["attention_mask"].sum(1)
        longest = int(lengths.max())
        labels = batch.pop("labels")[lengths == longest]
        batch = {key: value[lengths == longest, :longest] for key, value in batch.items()} | {"labels": labels}
    with torch.no_grad():
        losses, counted = task.losses(model, batch)
        expected = own_loss(name, model, batch)
    assert losses.dtype == torch.float32 and losses.shape == counted.shape
    assert int(counted.sum()) == task.count(batch)
    torch.testing.assert_close(losses.sum() / counted.sum(), expected, rtol=1e-6, atol=1e-6)
    assert not losses[~counted].any()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_rows_loss_is_the_same_in_any_batch(kind: str, name: str) -> None:
    task, model, rows = made(kind, name)
    tokenizer = tiny_wordpiece(kind)
    together, counted = task.row_losses(model, task.collate(rows, tokenizer))
    for k, row in enumerate(rows):
        alone, count = task.row_losses(model, task.collate([row], tokenizer))
        torch.testing.assert_close(together[k], alone[0], rtol=1e-4, atol=1e-5)
        assert counted[k] == count[0]


def test_several_labels_are_transformers_own_loss() -> None:
    task = task_of(TASKS["classification"].model_validate({"multi_label": True}), ["a", "b", "c"])
    model, tokenizer = tiny_encoder("bert", task.auto_class, **task.config()), tiny_wordpiece()
    examples = [LabelledText("stone", None, ("a",)), LabelledText("the river", None, ("b", "c"))]
    batch = task.collate([task.encode(example, tokenizer, SECTION)[0] for example in examples], tokenizer)
    with torch.no_grad():
        losses, counted = task.losses(model, batch)
        torch.testing.assert_close(losses.mean(), model(**batch).loss)
    assert counted.shape == (2, 1) and task.count(batch) == 2


def test_class_weights_multiply_the_losses() -> None:
    settings = TASKS["classification"].model_validate({"class_weights": "balanced"})
    labels, tokenizer = ["bad", "good"], tiny_wordpiece()
    plain, task = task_of(TASKS["classification"](), labels), task_of(settings, labels)  # type: ignore[call-arg]
    examples = [LabelledText("a film", None, label) for label in ("good", "good", "good", "bad")]
    task.weigh(examples)
    model = tiny_encoder("bert", task.auto_class, **task.config())
    batch = task.collate([task.encode(example, tokenizer, SECTION)[0] for example in examples], tokenizer)
    with torch.no_grad():
        weighed, unweighed = task.losses(model, batch)[0], plain.losses(model, batch)[0]
    torch.testing.assert_close(weighed[:, 0], unweighed[:, 0] * torch.tensor([4 / 6, 4 / 6, 4 / 6, 4 / 2]))


def test_class_weights_by_name() -> None:
    settings = TASKS["classification"].model_validate({"class_weights": {"good": 3.0}})
    task: Any = task_of(settings, ["bad", "good"])
    task.weigh([LabelledText("x", None, "good"), LabelledText("y", None, "bad")])
    assert task.weights.tolist() == [1.0, 3.0]
    with pytest.raises(DataError, match=r"task.class_weights names no label.*god.*bad, good"):
        odd: Any = task_of(TASKS["classification"].model_validate({"class_weights": {"god": 2.0}}), ["bad", "good"])
        odd.weigh([])


def test_a_regression_label_keeps_its_float32_bits() -> None:
    task, tokenizer = task_of(TASKS["regression"].model_validate({}), []), tiny_wordpiece()
    numbers = [0.1, -3.75, 1e-30]
    rows = [task.encode(LabelledText("x", None, number), tokenizer, SECTION)[0] for number in numbers]
    assert task.collate(rows, tokenizer)["labels"].tolist() == np.array(numbers, dtype=np.float32).tolist()
