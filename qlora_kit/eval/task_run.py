"""`qlora-kit eval` for tasks other than causal language modelling: every form on the same held-out rows."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console

from qlora_kit.data.examples import row_hash
from qlora_kit.data.report import DataReport
from qlora_kit.errors import EvalError
from qlora_kit.eval.forms import FormResult, PerRow
from qlora_kit.eval.intervals import bootstrap_ratio
from qlora_kit.eval.results import EvalResults, plot_results, print_table, write_results
from qlora_kit.eval.scored_forms import score_pairs
from qlora_kit.eval.task_form import TaskForm
from qlora_kit.eval.task_forms import find_task_forms
from qlora_kit.eval.task_readers import reader_of
from qlora_kit.eval.task_rows import TaskRow, held_out_task_rows
from qlora_kit.eval.task_score import TaskScores, interval
from qlora_kit.eval.task_scores import task_scores
from qlora_kit.train.restore import load_run_tokenizer, run_task
from qlora_kit.train.run_folder import RunFolder


def evaluate_task_run(
    run: RunFolder, console: Console, only: list[str] | None = None, max_rows: int | None = None
) -> EvalResults:
    """Scores the forms of `run` and writes RUN/eval/results.json and results.png; arguments as in `evaluate_run`.

    Raises:
        EvalError: a form is not there; RunError, DataError: the run or its data is not.
    """
    recipe, task, tokenizer = run.recipe(), run_task(run), load_run_tokenizer(run)
    reader = reader_of(task, tokenizer, recipe.data)
    forms = find_task_forms(run)
    check_forms(only or [], list(forms))
    report = DataReport([])
    rows = held_out_task_rows(recipe, task, tokenizer, max_rows or recipe.eval.max_rows, report)
    _say_left_out(report, console)
    if getattr(task.settings, "class_weights", "none") != "none":
        console.print("the loss here is without task.class_weights: each row counts the same", highlight=False)
    references = [reader.expected(row.example) for row in rows]
    results: dict[str, FormResult] = {}
    scored: dict[str, TaskScores] = {}
    for name in only or forms:
        console.print(f"scoring {name} on {len(rows)} rows", highlight=False)
        try:
            results[name], scored[name] = score_task_form(forms[name](), rows, references, recipe.run.seed)
        except torch.OutOfMemoryError:
            console.print(f"{name} does not fit into this device's memory and is left out", highlight=False)
    found = EvalResults(
        len(rows),
        results,
        score_pairs(results, scored, recipe.run.seed, numbers=task.settings.type == "regression"),
        {
            "task": task.settings.type,
            "labels": task.labels,
            "dtype": recipe.eval.dtype,
            "confidence": 0.95,
            "left_out": report.left_out(),
            "references": references,
            "row_hashes": [row_hash(row.example) for row in rows],
            "class_weights": "none",  # whatever training weighed rows with
        },
    )
    write_results(run.path, found)
    plot_results(found, run.path / "eval" / "results.png")
    print_table(found, console)
    return found


def check_forms(names: list[str], there: list[str]) -> None:
    """Nothing where all forms are there.

    Raises:
        EvalError: one is not.
    """
    for name in names:
        if name not in there:
            raise EvalError("no such form", got=name, allowed=", ".join(there), fix="Export first for bundles")


def score_task_form(
    form: TaskForm, rows: list[TaskRow], references: list[Any], seed: int
) -> tuple[FormResult, TaskScores]:
    """One form on all rows: its loss and scores with their intervals, and what differences are computed from."""
    started = time.perf_counter()
    with form.ready():
        read = form.score(rows)
    seconds, answers = time.perf_counter() - started, [row.answer.value for row in read]
    losses, counted = [row.loss for row in read], [row.counted for row in read]
    loss = bootstrap_ratio(losses, counted, seed=seed)
    found = task_scores(form.task.settings, answers, references, form.task.labels)
    scores = {name: interval(score, seed) for name, score in found.scores.items()}
    per_row = PerRow(losses, counted, found.correct, answers)
    return FormResult(loss, None, scores.get("accuracy"), len(rows), seconds, per_row, scores, found.details), found


def _say_left_out(report: DataReport, console: Console) -> None:
    for path, reasons in report.left_out().items():
        for reason, count in reasons.items():
            console.print(f"{path}: {count} rows left out ({reason})", markup=False, highlight=False)
