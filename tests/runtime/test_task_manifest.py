"""The manifest's `task`, the files of such a bundle, its graph and its reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from qlora_runtime import TaskBundle, check_files, read_manifest, verify_directory, write_manifest
from qlora_runtime.errors import ForeignFileError, FormatError, MissingFileError, ModelLoadError
from qlora_runtime.schema import Manifest, parse_manifest
from qlora_runtime.task import (
    ClassificationTask,
    QuestionAnsweringTask,
    RegressionTask,
    TaggingTask,
    parse_task,
    task_to_json,
)
from qlora_runtime.task_reference import TaskRow, TaskTolerance, read_task_reference, write_task_reference
from qlora_runtime.task_verify import compare_task, regrets

from .test_manifest import edit_json

TASKS = [
    ClassificationTask(("a", "b"), True, 128),
    RegressionTask(128),
    TaggingTask(("O", "B-x", "I-x"), "bio", 64),
    QuestionAnsweringTask(128, 30, False, 384),
]


def rewrite_manifest(folder, **changes) -> Manifest:
    old = read_manifest(folder)
    about = {name: getattr(old, name) for name in ("profile", "model", "provenance", "tools", "task")}
    return write_manifest(folder, **(about | {"verification": None} | changes))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.type)
def test_a_task_is_read_as_it_was_written(task):
    assert parse_task(task_to_json(task), "task") == task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "ranking"}, "task: type is 'ranking'; this version knows classification, regression"),
        ({"labels": ["a"]}, "labels is .*expected a list of at least two different names"),
        ({"labels": ["a", "a"]}, "at least two different names"),
        ({"scheme": "bioes"}, "scheme is 'bioes', expected bio or plain"),
        ({"max_seq_len": 0}, "max_seq_len is 0, expected an integer of at least 1"),
        ({"stride": 1}, "unknown fields \\['stride'\\]"),
    ],
)
def test_a_task_that_is_none_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        parse_task(task_to_json(TASKS[2]) | changes, "task")


def test_a_manifest_without_a_task_is_a_causal_lms(pristine_bundle):
    manifest = read_manifest(pristine_bundle)
    assert manifest.task is None and "task" not in manifest.to_json()


def test_the_manifest_holds_the_task(task_dir):
    manifest = read_manifest(task_dir)
    assert isinstance(manifest.task, ClassificationTask) and parse_manifest(manifest.to_json()) == manifest
    assert not (task_dir / "genai_config.json").exists()
    assert check_files(task_dir) == manifest


def test_a_missing_file_and_a_missing_pad_token_are_named(task_dir):
    rewrite_manifest(task_dir, model=replace(read_manifest(task_dir).model, pad_token_id=None))
    with pytest.raises(FormatError, match="pad_token_id is null, which this task needs"):
        TaskBundle.open(task_dir)
    (task_dir / "reference.json").unlink()
    with pytest.raises(MissingFileError, match=r"reference.json is missing, though manifest.json lists it"):
        TaskBundle.open(task_dir)


def test_a_graph_of_another_task_is_refused(task_dir):
    rewrite_manifest(task_dir, task=QuestionAnsweringTask(8, 6, False, 40))
    with pytest.raises(ModelLoadError, match=r"disagree on these inputs or outputs: \['end_logits', 'logits'"):
        TaskBundle.open(task_dir)


def test_a_reference_is_read_as_it_was_written(task_dir):
    reference = read_task_reference(task_dir)
    write_task_reference(task_dir, reference)
    again = read_task_reference(task_dir)
    assert again.tolerance == reference.tolerance and len(again.rows) == len(reference.rows) > 3
    for one, other in zip(reference.rows, again.rows, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["rows"].clear(), "expected a list of at least one row"),
        (lambda value: value["rows"][1]["token_type_ids"].pop(), r"rows\[1\]: lengths disagree"),
        (lambda value: value["rows"][0]["places"].append(99), r"rows\[0\]: lengths disagree"),
        (lambda value: value["tolerance"].pop("margin"), "lacks the field 'margin'"),
        (lambda value: value["rows"][0]["logits"].clear(), "expected a list of lists of numbers"),
    ],
)
def test_a_reference_that_is_none_is_refused(task_dir, change, message):
    edit_json(task_dir / "reference.json", change)
    rewrite_manifest(task_dir)
    with pytest.raises(FormatError, match=message):
        verify_directory(task_dir)


def test_a_reference_of_another_model_is_refused(task_dir):
    edit_json(task_dir / "reference.json", lambda value: value["rows"][0]["logits"][0].append(1.0))
    rewrite_manifest(task_dir)
    with pytest.raises(ForeignFileError, match=r"a row with logits \[1, 4\].*the model gives \[1, 3\]"):
        verify_directory(task_dir)


def test_decisions_past_the_tolerance_fail(task_bundle):
    bundle = task_bundle("bert classifies")
    reference = read_task_reference(bundle.directory)
    shifted = [replace(row, logits=np.roll(row.logits, 1, axis=1)) for row in reference.rows]
    loose = TaskTolerance(max_logit=100.0, min_agreement=0.995, margin=0.0)
    report = compare_task(bundle, replace(reference, rows=shifted, tolerance=loose))
    assert not report.passed and "decisions differ, allowed are 1" in report.reasons[0]
    one = [replace(reference.rows[0], logits=np.roll(reference.rows[0].logits, 1, axis=1)), *reference.rows[1:]]
    assert compare_task(bundle, replace(reference, rows=one, tolerance=loose)).passed, "one may, of few rows"
    exact = TaskTolerance(max_logit=100.0, min_agreement=1.0, margin=0.0)
    assert not compare_task(bundle, replace(reference, rows=one, tolerance=exact)).passed


def reference_row(logits, places=()):
    ids = np.arange(max(len(logits), 1))
    return TaskRow(ids, ids * 0, places, np.array(logits, dtype=np.float32))


def test_regrets_of_every_task():
    def lost(task, reference, logits, places=()):
        return regrets(task, reference_row(reference, places), np.array(logits, dtype=np.float32)).tolist()

    single, several, rating, tagging, answering = replace(TASKS[0], multi_label=False), *TASKS
    assert lost(single, [[1, 3]], [[5, 4]]) == [2.0] and lost(single, [[1, 3]], [[4, 5]]) == [0.0]
    assert lost(several, [[1, -3]], [[2, 1]]) == [0.0, 3.0] and lost(several, [[1, -3]], [[9, -1]]) == [0.0, 0.0]
    assert lost(rating, [[1]], [[2]]) == []
    assert lost(tagging, [[1, 0, 0], [0, 2, 0]], [[1, 0, 0], [0, 0, 1]]) == [0.0, 2.0]
    reference = [[0, 0], [2, 1], [1, 4]]
    assert lost(answering, reference, [[0, 0], [2, 1], [1, 4]], (1, 3)) == [0.0]
    assert lost(answering, reference, [[0, 0], [2, 9], [1, 4]], (1, 3)) == [3.0]
    unanswerable = replace(answering, unanswerable=True)
    assert lost(unanswerable, reference, [[9, 9], [2, 1], [1, 4]], (1, 3)) == [6.0]
