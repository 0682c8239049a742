"""RUN/eval/benchmarks.json: scores of each form on each task, with the values per row that pairs are compared by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.eval.json_file import read_as, write_finite

FORMAT = "qlora-benchmarks/1"

RowValue = float | list[float]
"""A row's score; for perplexities [log-probability in nats, units (words or bytes)]."""


@dataclass(frozen=True)
class Metric:
    """One number of a task, with its 95% interval."""

    value: float
    low: float | None
    high: float | None
    """None where too few rows, or no rule for this metric, give an interval."""
    higher_is_better: bool
    share: bool
    """A mean of values from 0 to 1, shown as percent."""


@dataclass(frozen=True)
class TaskScore:
    """One form of a model on one task, or on a group of tasks."""

    metrics: dict[str, Metric]
    """By lm-eval's name; with the filter behind it, where a task has several."""
    rows: int
    rows_in_all: int
    """Rows of the task, of which a limit takes the first."""
    few_shot: int | None
    """Examples in the prompt; None for groups."""
    version: str
    """Of lm-eval's definition."""
    source: str
    """`local files` or `hub`."""
    fingerprint: str
    """sha256 over rows, prompts and expected answers, in order."""
    adapter: str | None
    """sha256 of the adapter that was scored; None for a base."""
    tools: dict[str, str]
    per_row: dict[str, list[RowValue]] = field(default_factory=dict)
    """By metric; empty for groups, whose rows are those of their tasks."""
    tasks: list[str] = field(default_factory=list)
    """Of a group: its tasks, those of groups within it included."""


Benchmarks = dict[str, dict[str, TaskScore]]
"""Form, then task."""


def merge_benchmarks(run_dir: Path, found: Benchmarks, adapter: str | None) -> Benchmarks:
    """Adds `found` to RUN/eval/benchmarks.json, task by task, and returns the whole.

    What was scored with another adapter than the run has now (it was trained on since) is dropped.

    Raises:
        EvalError: a number is not finite.
        RunError: the file is damaged, or the disk is full.
    """
    path = run_dir / "eval" / "benchmarks.json"
    merged: Benchmarks = {}
    for forms in (read_benchmarks(run_dir) if path.exists() else {}, found):
        for form, scores in forms.items():
            kept = {name: score for name, score in scores.items() if score.adapter in (None, adapter)}
            if kept:
                merged[form] = {**merged.get(form, {}), **kept}
    trees = {form: {name: asdict(score) for name, score in scores.items()} for form, scores in merged.items()}
    write_finite(path, {"format": FORMAT, "forms": trees}, "benchmarks")
    return merged


def read_benchmarks(run_dir: Path) -> Benchmarks:
    """Reads what `merge_benchmarks` wrote.

    Raises:
        RunError: the file is missing, not JSON, or of another format.
    """
    missing = RunError(f"no benchmarks in {run_dir}", fix="Score the run with --tasks first")
    fix = "Move it away, and score the run again with --tasks"
    return read_as(run_dir / "eval" / "benchmarks.json", FORMAT, _from_tree, missing, fix)


def _from_tree(tree: dict[str, Any]) -> Benchmarks:
    return {
        form: {name: _score_from_tree(score) for name, score in scores.items()}
        for form, scores in tree["forms"].items()
    }


def _score_from_tree(tree: dict[str, Any]) -> TaskScore:
    return TaskScore(**{**tree, "metrics": {name: Metric(**metric) for name, metric in tree["metrics"].items()}})


def headings(scores: dict[str, TaskScore]) -> list[str]:
    """Tasks to show: groups with a score of their own, and tasks that are in none of those."""
    grouped = {name for score in scores.values() if score.metrics for name in score.tasks}
    return [name for name, score in scores.items() if score.metrics and name not in grouped]
