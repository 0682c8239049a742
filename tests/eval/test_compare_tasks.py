"""`qlora-kit compare` of tasks other than causal language modelling: their own scores, on the same rows and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_encoders import task_rows
from tiny_run import changed_copy
from tiny_task_runs import label_rows, tiny_bert, train_task

from qlora_kit.eval.compare import compare_runs
from qlora_kit.eval.evaluated import EvaluatedRun
from qlora_kit.eval.forms import FormResult, PerRow
from qlora_kit.eval.harness.pairs import Pair
from qlora_kit.eval.held_out_pairs import pair_held_out
from qlora_kit.eval.intervals import bootstrap_ratio
from qlora_kit.eval.results import EvalResults
from qlora_kit.eval.run import evaluate_run
from qlora_kit.eval.task_score import interval
from qlora_kit.eval.task_scores import task_scores
from qlora_kit.task_settings import TASKS
from qlora_kit.train.run_folder import RunFolder

__all__ = ["tiny_bert"]
QUIET = Console(quiet=True)
AB, TAGS = ["a", "b"], ["O", "B-X", "I-X"]
FIRST, SECOND = "anna sold seven boats", "the bridge of stone and iron"

CASES: list[tuple[str, dict[str, Any], list[str], list[Any], list[Any], str]] = [
    # task, settings, labels, references and the worse run's answers of four rows; the score that must differ
    ("classification", {}, AB, ["a", "b", "a", "b"], ["a", "a", "a", "b"], "matthews"),
    ("classification", {"multi_label": True}, AB, [["a"], AB, [], ["b"]], [["a"], ["a"], [], ["b"]], "f1_micro"),
    ("image_classification", {}, AB, ["a", "b", "a", "b"], ["a", "a", "a", "b"], "f1_macro"),
    ("regression", {}, [], [0.0, 1.0, 2.0, 5.0], [0.5, 1.0, 3.0, 2.0], "pearson"),
    ("regression", {}, [], [0.0, 1.0, 2.0, 5.0], [0.5, 3.0, 1.0, 2.0], "spearman"),
    ("tagging", {}, TAGS, [TAGS[:2], TAGS[1:], ["B-X"], ["O"]], [["O", "O"], TAGS[1:], ["B-X"], ["O"]], "span_f1"),
    (
        "tagging",
        {"scheme": "plain"},
        AB,
        [["a", "b"], ["b"], ["a"], ["a"]],
        [["a"] * 2, ["b"], ["a"], ["a"]],
        "f1_macro",
    ),
    ("question_answering", {}, [], [["the sea"], ["x"], ["y"], ["z"]], ["sea side", "x", "y", "z"], "f1"),
    ("seq2seq", {}, [], [FIRST, SECOND, FIRST, SECOND], [FIRST, FIRST, FIRST, SECOND], "bleu"),
    ("seq2seq", {}, [], [FIRST, SECOND, FIRST, SECOND], [FIRST, FIRST, FIRST, SECOND], "chrf"),
    ("speech_recognition", {}, [], [FIRST, SECOND, FIRST, SECOND], [FIRST, FIRST, FIRST, SECOND], "wer"),
]


def evaluated(name: str, task: Any, labels: list[str], references: list[Any], answers: list[Any]) -> EvaluatedRun:
    """What `read_run` makes of a run whose tuned form gave these answers."""
    scored = task_scores(task, answers, references, labels)
    rows, asked = len(references), dict.fromkeys(("task", "labels", "files", "fraction", "seed", "row_hashes"))
    scores = {name: interval(score, 0) for name, score in scored.scores.items()}
    loss, per_row = bootstrap_ratio([1.0] * rows, [1] * rows), PerRow([1.0] * rows, [1] * rows, scored.correct, answers)
    form = FormResult(loss, None, scores.get("accuracy"), rows, 0.0, per_row, scores)
    results = EvalResults(rows, {"tuned": form}, [], {"labels": labels, "references": references})
    return EvaluatedRun(name, {}, asked, task, results, {})


@pytest.mark.parametrize(("task", "settings", "labels", "references", "worse", "metric"), CASES)
def test_a_tasks_own_scores(
    task: str, settings: Any, labels: list[str], references: list[Any], worse: list[Any], metric: str
) -> None:
    right = [row[0] for row in references] if task == "question_answering" else references
    made = TASKS[task].model_validate(settings)
    runs = [evaluated(name, made, labels, references, said) for name, said in (("first", right), ("second", worse))]
    pairs: list[Pair] = []
    reasons: list[str] = []
    pair_held_out(runs[1], runs[0], "tuned", pairs, reasons)
    first, second = (task_scores(made, said, references, labels).scores for said in (right, worse))
    assert not reasons and [pair.metric for pair in pairs] == [*second, "loss"]
    for pair in pairs[:-1]:
        values = [interval(scores[pair.metric], 0).value for scores in (second, first)]
        assert pair.difference == pytest.approx(values[0] - values[1], abs=1e-12)
        assert pair.low <= pair.difference <= pair.high and pair.rows == 4
        assert (pair.a, pair.b, pair.share) == ("second:tuned", "first:tuned", pair.metric == "accuracy")
    [found] = [pair for pair in pairs if pair.metric == metric]
    assert abs(found.difference) > 0.01


def test_one_file_with_two_columns_of_labels(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [{**row, "other": ["p", "q"][k % 2]} for k, row in enumerate(label_rows(40))]
    runs = [
        train_task(
            tmp_path / column,
            tiny_bert,
            {"type": "classification"},
            rows[:24],
            rows[24:],
            data={"columns": {"label": column}},
            run={"name": column},
        )
        for column in ("label", "other")
    ]
    for run in runs:
        evaluate_run(run, QUIET, ["tuned"])
    found = compare_runs([run.path for run in runs])
    assert not found.pairs and found.not_comparable == ["held-out rows: other and label: other labels"]


def test_the_same_rows_with_other_answers(tmp_path: Path, tiny_bert: Path) -> None:
    rows = task_rows("tagging", 30)
    run = train_task(tmp_path / "made", tiny_bert, {"type": "tagging"}, rows[:20], rows[20:])
    evaluate_run(run, QUIET, ["tuned"])
    two = [changed_copy(run.path, tmp_path / name) for name in ("first", "second")]
    found = compare_runs(two)
    assert [pair.metric for pair in found.pairs] == ["span_f1", "word_accuracy", "loss"] and not found.not_comparable
    assert all(pair.difference == pair.low == pair.high == 0 for pair in found.pairs)
    path = two[1] / "eval" / "results.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["metrics"]["row_hashes"][3] = "0" * 16
    path.write_text(json.dumps(tree), encoding="utf-8")
    found = compare_runs(two)
    assert not found.pairs and found.not_comparable == ["held-out rows: second and first: other rows or answers"]


def test_another_task_is_not_paired(tmp_path: Path, tiny_bert: Path) -> None:
    rows = task_rows("tagging", 30)
    runs = []
    for scheme in ("bio", "plain"):
        task = {"type": "tagging", "scheme": scheme, "labels": ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]}
        runs.append(train_task(tmp_path / scheme, tiny_bert, task, rows[:20], rows[20:], run={"name": scheme}))
        evaluate_run(runs[-1], QUIET, ["tuned"])
    found = compare_runs([RunFolder.open(run.path).path for run in runs])
    assert not found.pairs and found.not_comparable == ["held-out rows: plain and bio: other tasks"]
