"""`qlora-kit compare`: evaluated runs side by side, paired row by row wherever they were asked the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from qlora_kit.errors import EvalError
from qlora_kit.eval.evaluated import EvaluatedRun, read_run
from qlora_kit.eval.forms import FormResult
from qlora_kit.eval.harness.pairs import Pair, why_not_comparable
from qlora_kit.eval.harness.results import Metric, headings
from qlora_kit.eval.harness.show import common_pairs, lines, pair_table, score_cell
from qlora_kit.eval.held_out_pairs import HELD_OUT, pair_held_out
from qlora_kit.eval.intervals import Interval


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; each other run less the first, form by form."""

    runs: list[EvaluatedRun]
    pairs: list[Pair]
    not_comparable: list[str]
    """What could not be paired, and why."""

    def to_json(self) -> dict[str, Any]:
        """A tree for json.dumps: scores without their values per row."""
        runs = {}
        for run in self.runs:
            forms: dict[str, Any] = {form: {} for form in run.forms()}
            for form, result in (run.results.forms if run.results else {}).items():
                kept = {name: asdict(value) for name, value in _scores(result).items()}
                forms[form][HELD_OUT] = {"rows": result.rows, **kept}
            for task, metric, form, score in lines(run.benchmarks):
                entry = forms[form].setdefault(task, {"rows": score.rows, "few_shot": score.few_shot})
                entry[metric] = asdict(score.metrics[metric])
            runs[run.name] = {"facts": run.facts, "forms": forms}
        return {"runs": runs, "pairs": [asdict(pair) for pair in self.pairs], "not_comparable": self.not_comparable}


def compare_command(options: argparse.Namespace) -> None:
    """Prints the comparison of the runs in `options`, as tables or as JSON."""
    comparison = compare_runs([Path(path) for path in options.runs])
    if options.json:
        print(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
    else:
        print_comparison(comparison, Console())


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Reads the runs' evaluations and manifests, and pairs each other run with the first.

    Raises:
        EvalError: fewer than two runs, one twice, or one that was never evaluated.
        RunError: a folder is no run, or a file of it is damaged.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise EvalError("runs to compare", got=[str(f) for f in folders], allowed="two or more, each once")
    alone = len({folder.resolve().name for folder in folders}) == len(folders)
    runs = [read_run(folder, folder.resolve().name if alone else str(folder)) for folder in folders]
    pairs: list[Pair] = []
    reasons: list[str] = []
    for run in runs[1:]:
        for form in run.forms():
            if form in runs[0].forms():
                pair_held_out(run, runs[0], form, pairs, reasons)
                _pair_benchmarks(run, runs[0], form, pairs, reasons)
    return Comparison(runs, pairs, list(dict.fromkeys(reasons)))


def _scores(result: FormResult) -> dict[str, Interval]:
    found = {"loss": result.loss, "perplexity": result.perplexity, "accuracy": result.accuracy, **result.scores}
    return {name: interval for name, interval in found.items() if interval is not None}


def _pair_benchmarks(run: EvaluatedRun, first: EvaluatedRun, form: str, pairs: list[Pair], reasons: list[str]) -> None:
    """Adds the paired differences of one form on all tasks that both were asked, or why there are none."""
    ours, theirs = run.benchmarks.get(form, {}), first.benchmarks.get(form, {})
    pairs += common_pairs((f"{run.name}:{form}", ours), (f"{first.name}:{form}", theirs))
    for task in headings(ours):
        if task in theirs and (reason := why_not_comparable(ours[task], theirs[task])):
            reasons.append(f"{task}: {run.name} and {first.name}: {reason}")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What the runs are, their scores, and the paired differences."""
    console.print(_facts_table(comparison.runs))
    console.print(_score_table(comparison.runs))
    if comparison.pairs:
        console.print(pair_table(comparison.pairs))
    for reason in comparison.not_comparable:
        console.print(f"not asked the same, so not paired: {reason}", markup=False, highlight=False)


def _facts_table(runs: list[EvaluatedRun]) -> Table:
    table = Table(title="Runs", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name in dict.fromkeys(name for run in runs for name in run.facts):
        values = [run.facts.get(name) for run in runs]
        if any(value is not None for value in values):
            table.add_row(name.removesuffix(", bytes"), *(_shown(name, value) for value in values))
    return table


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith(", bytes"):
        return decimal(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _score_table(runs: list[EvaluatedRun]) -> Table:
    """A line for each task, metric and form; a column for each run."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for run in runs:
        for form, result in (run.results.forms if run.results else {}).items():
            for metric, found in _scores(result).items():
                own = Metric(found.value, found.low, found.high, metric == "accuracy", metric == "accuracy")
                cells.setdefault((HELD_OUT, metric, form), {})[run.name] = score_cell(own)
        for task, metric, form, score in lines(run.benchmarks):
            cells.setdefault((task, metric, form), {})[run.name] = score_cell(score.metrics[metric])
    table = Table(title="Scores, 95% intervals", title_justify="left")
    for heading in ("task", "metric", "form"):
        table.add_column(heading)
    for run in runs:
        table.add_column(run.name, justify="right")
    for key, by_run in cells.items():
        table.add_row(*key, *(by_run.get(run.name, "-") for run in runs))
    return table
