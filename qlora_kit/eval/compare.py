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
from qlora_kit.eval.forms import FormResult, MetricName, compare_forms
from qlora_kit.eval.harness.pairs import Pair, why_not_comparable
from qlora_kit.eval.harness.results import Benchmarks, Metric, headings, read_benchmarks
from qlora_kit.eval.harness.show import common_pairs, lines, pair_table, score_cell
from qlora_kit.eval.intervals import FEWEST_ROWS, Interval
from qlora_kit.eval.results import EvalResults, read_results
from qlora_kit.export.bundle import REJECTED
from qlora_kit.train.run_folder import RunFolder

_HELD_OUT = "held-out rows"


@dataclass(frozen=True)
class EvaluatedRun:
    """One run with what is known about it."""

    name: str
    facts: dict[str, Any]
    """Trainable parameters, memory, speed, sizes; None where the run does not say."""
    asked: dict[str, Any]
    """What decides which held-out rows were scored."""
    results: EvalResults | None
    benchmarks: Benchmarks

    def forms(self) -> list[str]:
        return list(dict.fromkeys([*(self.results.forms if self.results else {}), *self.benchmarks]))

    def held_out(self, form: str) -> FormResult | None:
        return self.results.forms.get(form) if self.results else None


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
                forms[form][_HELD_OUT] = {"rows": result.rows, **kept}
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
    runs = [_read(folder, folder.resolve().name if alone else str(folder)) for folder in folders]
    pairs: list[Pair] = []
    reasons: list[str] = []
    for run in runs[1:]:
        for form in run.forms():
            if form in runs[0].forms():
                _pair_held_out(run, runs[0], form, pairs, reasons)
                _pair_benchmarks(run, runs[0], form, pairs, reasons)
    return Comparison(runs, pairs, list(dict.fromkeys(reasons)))


def _read(folder: Path, name: str) -> EvaluatedRun:
    run = RunFolder.open(folder)
    held_out = read_results(folder) if (folder / "eval" / "results.json").exists() else None
    benchmarks = read_benchmarks(folder) if (folder / "eval" / "benchmarks.json").exists() else {}
    if held_out is None and not benchmarks:
        raise EvalError(f"{folder} was never evaluated", fix=f"qlora-kit eval {folder}")
    recipe, manifest = run.recipe(), run.manifest()
    results, data = manifest.get("results", {}), manifest.get("data", {})
    facts = {
        "base": manifest.get("base", {}).get("model"),
        "quant": recipe.base.quant,
        "adapter": recipe.adapter.method,
        "steps": manifest.get("step"),
        "trainable parameters": results.get("trainable_params"),
        "peak memory, bytes": results.get("peak_rss_bytes"),
        "peak GPU memory, bytes": results.get("peak_gpu_bytes"),
        "training, tokens/s": results.get("tokens_per_s"),
        **{
            f"bundle {file.parent.name}, bytes": _size(file.parent)
            for file in sorted(run.bundles.glob("[a-z]*/manifest.json"))
            if file.parent.suffix != REJECTED
        },
    }
    own_file = data.get("eval")
    whole = held_out is not None and own_file and held_out.rows >= data.get("eval_rows", 0)
    asked = {
        "files": [source.get("fingerprint") for source in ([own_file] if own_file else data.get("train", []))],
        "fraction": None if own_file else recipe.data.eval_fraction,
        "seed": None if whole else recipe.run.seed,
        "answers": [held_out.metrics.get(name) for name in ("answer", "choices")] if held_out else None,
    }
    return EvaluatedRun(name, facts, asked, held_out, benchmarks)


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _scores(result: FormResult) -> dict[str, Interval]:
    found = {"loss": result.loss, "perplexity": result.perplexity, "accuracy": result.accuracy, **result.scores}
    return {name: interval for name, interval in found.items() if interval is not None}


def _pair_held_out(run: EvaluatedRun, first: EvaluatedRun, form: str, pairs: list[Pair], reasons: list[str]) -> None:
    """Adds the paired differences of one form on the held-out rows, or why there are none."""
    ours, theirs = run.held_out(form), first.held_out(form)
    if ours is None or theirs is None:
        return
    if reason := _other_rows(run, first, ours, theirs):
        reasons.append(f"{_HELD_OUT}: {run.name} and {first.name}: {reason}")
        return
    metrics: list[MetricName] = []
    if ours.accuracy and theirs.accuracy and run.asked["answers"] == first.asked["answers"]:
        metrics.append("accuracy")
    elif ours.accuracy and theirs.accuracy:
        reasons.append(f"{_HELD_OUT}, accuracy: {run.name} and {first.name}: other eval.answer or eval.choices")
    if ours.per_row.loss_tokens == theirs.per_row.loss_tokens:
        metrics += ["loss", "perplexity"] if ours.perplexity and theirs.perplexity else ["loss"]
    else:
        reasons.append(f"{_HELD_OUT}, loss: {run.name} and {first.name} make other tokens of the same rows")
    for metric in metrics:
        a, b = f"{run.name}:{form}", f"{first.name}:{form}"
        pair = compare_forms({a: ours, b: theirs}, a, b, metric)
        ends = pair.difference, pair.low, pair.high
        pairs.append(Pair(a, b, _HELD_OUT, metric, ours.rows, *ends, share=metric == "accuracy"))


def _other_rows(run: EvaluatedRun, first: EvaluatedRun, ours: FormResult, theirs: FormResult) -> str | None:
    if ours.rows != theirs.rows:
        return f"{ours.rows} and {theirs.rows} rows"
    if ours.rows < FEWEST_ROWS:
        return f"{ours.rows} rows are too few"
    for name, reason in (("files", "other data"), ("fraction", "other data.eval_fraction"), ("seed", "other run.seed")):
        if run.asked[name] != first.asked[name]:
            return reason
    return None


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
        console.print(f"not the same rows, so not paired: {reason}", markup=False, highlight=False)


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
                cells.setdefault((_HELD_OUT, metric, form), {})[run.name] = score_cell(own)
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
