"""One form of a model on lm-eval's tasks: lm-eval evaluates, and its result becomes ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import lm_eval
from lm_eval.api.group import Group

from qlora_kit.eval.harness.engines import engine_of
from qlora_kit.eval.harness.language_model import HarnessModel
from qlora_kit.eval.harness.pairs import metric_of
from qlora_kit.eval.harness.results import Metric, RowValue, TaskScore
from qlora_kit.eval.scorers import BundleScorer, TorchScorer

_DRAWS = 1000  # of lm-eval's bootstrap, for the metrics that have no formula
_HASHES = ("doc_hash", "prompt_hash", "target_hash")


def score_form_on(
    form: TorchScorer | BundleScorer,
    tasks: dict[str, Any],
    limit: int | None,
    source: str,
    adapter: str | None,
    tools: dict[str, str],
) -> dict[str, TaskScore]:
    """Scores by task and group.

    Args:
        tasks: of `tasks.load_tasks`; lm-eval makes their requests anew for each form.
        limit: rows of each task, from the first on; None takes all.
        source, adapter, tools: noted with the scores.

    Raises:
        EvalError: a request does not fit the model.
    """
    found: Any = lm_eval.evaluate(HarnessModel(engine_of(form)), tasks, limit=limit, bootstrap_iters=_DRAWS)
    note: dict[str, Any] = {"source": source, "adapter": adapter, "tools": tools}
    scores = {name: _task_score(name, found, note) for name in found["samples"]}
    for name, group in tasks["groups"].items():
        members = [task.task_name for task in group.get_all_tasks()]
        scores[name] = _group_score(name, found, group, {member: scores[member] for member in members}, note)
    return scores


def _task_score(name: str, found: dict[str, Any], note: dict[str, Any]) -> TaskScore:
    samples, numbers = found["samples"][name], found["results"][name]
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    metrics: dict[str, Metric] = {}
    per_row: dict[str, list[RowValue]] = {}
    for key, rows in by_filter.items():
        for metric in rows[0]["metrics"]:
            label = metric if len(by_filter) == 1 else f"{metric} ({key})"
            values = per_row[label] = [_row_value(row[metric]) for row in rows]
            value, stderr = float(numbers[f"{metric},{key}"]), numbers.get(f"{metric}_stderr,{key}")
            metrics[label] = metric_of(label, value, stderr, values, bool(found["higher_is_better"][name][metric]))
    size = found["n-samples"][name]
    return TaskScore(
        metrics=metrics,
        rows=size["effective"],
        rows_in_all=size["original"],
        few_shot=found["n-shot"][name],
        version=str(found["versions"][name]),
        fingerprint=_fingerprint(row[field] for row in next(iter(by_filter.values())) for field in _HASHES),
        per_row=per_row,
        **note,
    )


def _group_score(
    name: str, found: dict[str, Any], group: Group, members: dict[str, TaskScore], note: dict[str, Any]
) -> TaskScore:
    """A group with lm-eval's aggregates; without metrics where lm-eval defines none."""
    numbers = found["results"].get(name, {})
    first = next(iter(members.values()))
    metrics = {}
    for key in numbers:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = metric if metric in first.metrics else f"{metric} ({filtered})"
        values = [row for score in members.values() for row in score.per_row.get(label, [])]
        higher = first.metrics[label].higher_is_better
        metrics[label] = metric_of(
            label, float(numbers[key]), numbers.get(f"{metric}_stderr,{filtered}"), values, higher
        )
    shots = {score.few_shot for score in members.values()}
    return TaskScore(
        metrics=metrics,
        rows=sum(score.rows for score in members.values()),
        rows_in_all=sum(score.rows_in_all for score in members.values()),
        few_shot=shots.pop() if len(shots) == 1 else None,
        version=group.version,
        fingerprint=_fingerprint(score.fingerprint for score in members.values()),
        tasks=list(members),
        **note,
    )


def _fingerprint(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _row_value(value: Any) -> RowValue:
    """A row's score as lm-eval holds it: a number (numpy's too), or (log-probability, units)."""
    return [float(part) for part in value] if isinstance(value, tuple | list) else float(value)
