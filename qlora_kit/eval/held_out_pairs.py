"""Two evaluated runs on the held-out rows: paired row by row where they were asked the same."""

from __future__ import annotations

from qlora_kit.eval.evaluated import EvaluatedRun
from qlora_kit.eval.forms import FormResult, MetricName, compare_forms
from qlora_kit.eval.harness.pairs import Pair
from qlora_kit.eval.intervals import FEWEST_ROWS, Interval
from qlora_kit.eval.task_score import difference
from qlora_kit.eval.task_scores import task_scores

HELD_OUT = "held-out rows"
_REASONS = {
    "task": "other tasks",
    "labels": "other labels",
    "files": "other data",
    "fraction": "other data.eval_fraction",
    "seed": "other run.seed",
    "row_hashes": "other rows or answers",
}
"""What must be the same in `EvaluatedRun.asked`, and what is said where it is not."""


def pair_held_out(run: EvaluatedRun, first: EvaluatedRun, form: str, pairs: list[Pair], reasons: list[str]) -> None:
    """Adds the paired differences of one form on the held-out rows, or why there are none."""
    ours, theirs = run.held_out(form), first.held_out(form)
    if ours is None or theirs is None:
        return
    who = f"{run.name} and {first.name}"
    if reason := _asked_otherwise(run, first, ours, theirs):
        reasons.append(f"{HELD_OUT}: {who}: {reason}")
        return
    found = _score_differences(run, first, ours, theirs) if ours.scores else {}
    if ours.accuracy and theirs.accuracy and not ours.scores:
        if run.asked["answers"] == first.asked["answers"]:
            found["accuracy"] = _form_difference(ours, theirs, "accuracy")
        else:
            reasons.append(f"{HELD_OUT}, accuracy: {who}: other eval.answer or eval.choices")
    if ours.per_row.loss_tokens == theirs.per_row.loss_tokens:
        found["loss"] = _form_difference(ours, theirs, "loss")
        if ours.perplexity and theirs.perplexity:
            found["perplexity"] = _form_difference(ours, theirs, "perplexity")
    else:
        reasons.append(f"{HELD_OUT}, loss: {who} make other tokens of the same rows")
    for metric, of in found.items():
        names, ends = (f"{run.name}:{form}", f"{first.name}:{form}"), (of.value, of.low, of.high)
        pairs.append(Pair(*names, HELD_OUT, metric, ours.rows, *ends, share=metric == "accuracy"))


def _asked_otherwise(run: EvaluatedRun, first: EvaluatedRun, ours: FormResult, theirs: FormResult) -> str | None:
    """What keeps the two from being compared row by row; None where nothing does."""
    if ours.rows != theirs.rows:
        return f"{ours.rows} and {theirs.rows} rows"
    if ours.rows < FEWEST_ROWS:
        return f"{ours.rows} rows are too few"
    return next((reason for name, reason in _REASONS.items() if run.asked[name] != first.asked[name]), None)


def _score_differences(
    run: EvaluatedRun, first: EvaluatedRun, ours: FormResult, theirs: FormResult
) -> dict[str, Interval]:
    """Of each score of a task, which is made again from the answers that both runs gave."""
    assert run.results is not None
    asked = run.results.metrics["references"], run.results.metrics["labels"]
    a, b = (task_scores(run.task, form.per_row.answer or [], *asked).scores for form in (ours, theirs))
    return {name: difference(score, b[name], seed=0) for name, score in a.items()}


def _form_difference(ours: FormResult, theirs: FormResult, metric: MetricName) -> Interval:
    pair = compare_forms({"ours": ours, "theirs": theirs}, "ours", "theirs", metric)
    return Interval(pair.difference, pair.low, pair.high)
