"""What `qlora-kit eval` found: RUN/eval/results.json, its table in the terminal and its plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.forms import FormResult, PairResult, PerRow
from qlora_kit.eval.intervals import FEWEST_ROWS, Interval
from qlora_kit.eval.json_file import read_as, write_finite

FORMAT = "qlora-eval/1"
MOST_COLUMNS = 5
"""Scores that stand beside each other in a terminal."""
_BLUE = "#2a6fb0"


@dataclass(frozen=True)
class EvalResults:
    """RUN/eval/results.json."""

    rows: int
    forms: dict[str, FormResult]
    pairs: list[PairResult] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """How the numbers came about: answer check, choices, dtype, confidence, rows left out (path, reason, count)."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: str = FORMAT


def write_results(run_dir: Path, results: EvalResults) -> Path:
    """Writes RUN/eval/results.json: whole and on the disk, or not at all.

    Raises:
        EvalError: a number is not finite and so has no place in JSON.
        RunError: there is no run folder, or the disk is full.
    """
    if not run_dir.is_dir():
        raise RunError(f"no run folder {run_dir}", fix="Train first, or check the path")
    path = run_dir / "eval" / "results.json"
    write_finite(path, _tree(results), "results")
    return path


def read_results(run_dir: Path) -> EvalResults:
    """Reads what `write_results` wrote.

    Raises:
        RunError: the file is missing, not JSON, or of another format.
    """
    missing = RunError(f"no evaluation in {run_dir}", fix="Evaluate the run first")
    return read_as(run_dir / "eval" / "results.json", FORMAT, _from_tree, missing, "Evaluate the run again")


def _from_tree(tree: dict[str, Any]) -> EvalResults:
    forms = {name: _form_from_tree(form) for name, form in tree["forms"].items()}
    pairs = [PairResult(**pair) for pair in tree["pairs"]]
    return EvalResults(tree["rows"], forms, pairs, tree["metrics"], tree["created"])


def print_table(results: EvalResults, console: Console) -> None:
    """Prints one line a form, each number with its 95% interval, and below it the paired differences.

    Of fewer than 3 rows the interval is `-`.
    """
    few = results.rows < FEWEST_ROWS
    scores = _score_names(results)
    if scores:
        _print_scores(results, scores, console, few)
        return
    checked = any(form.accuracy for form in results.forms.values())
    table = Table(title=f"{results.rows} held-out rows, 95% intervals", title_justify="left")
    table.add_column("form")
    for heading in ["loss (nats/token)", "perplexity", *(["accuracy (%)"] if checked else []), "seconds"]:
        table.add_column(heading, justify="right")
    for name, form in results.forms.items():
        perplexity = _cell(form.perplexity, 2, few=few) if form.perplexity else "-"
        cells = [name, _cell(form.loss, 3, few=few), perplexity]
        if checked:
            cells.append(_cell(form.accuracy, 1, scale=100, few=few) if form.accuracy else "-")
        table.add_row(*cells, f"{form.seconds:.1f}")
    console.print(table)
    if results.pairs:
        console.print(_pair_table(results.pairs, few))


def plot_results(results: EvalResults, path_png: Path) -> Path:
    """Draws accuracy (where answers were checked) and perplexity, or a task's scores, of all forms with their 95%
    intervals.

    Raises:
        EvalError: there are no forms to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not results.forms:
        raise EvalError("no forms to plot", fix="Evaluate the run first")
    panels = _panels(results)
    figure = Figure(figsize=(5.2 * len(panels), 1.4 + 0.42 * len(results.forms)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, scale, intervals) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, title, scale, intervals)
    figure.suptitle(f"{results.rows} held-out rows, 95% bootstrap intervals", fontsize=10)
    figure.savefig(path_png, dpi=150)
    return path_png


def _panels(results: EvalResults) -> list[tuple[str, float, dict[str, Interval]]]:
    """(title, scale, interval of each form)."""
    if scores := _score_names(results):
        loss = ("Loss (lower is better)", 1.0, {name: form.loss for name, form in results.forms.items()})
        return [
            *[(title, 1.0, {name: form.scores[title] for name, form in results.forms.items()}) for title in scores],
            loss,
        ]
    panels = []
    if accuracies := {name: form.accuracy for name, form in results.forms.items() if form.accuracy}:
        panels.append(("Accuracy, % of rows (higher is better)", 100.0, accuracies))
    perplexities = {name: form.perplexity for name, form in results.forms.items() if form.perplexity}
    return [*panels, ("Perplexity (lower is better)", 1.0, perplexities)]


def _draw(axes: Any, title: str, scale: float, intervals: dict[str, Interval]) -> None:
    names = list(intervals)
    values = [scale * intervals[name].value for name in names]
    # An interval can leave out its value where rows are few; an error bar cannot have a negative length.
    below = [max(0.0, scale * (intervals[name].value - intervals[name].low)) for name in names]
    above = [max(0.0, scale * (intervals[name].high - intervals[name].value)) for name in names]
    places = range(len(names))
    axes.errorbar(values, places, xerr=[below, above], fmt="o", color=_BLUE, ecolor=_BLUE, capsize=4, markersize=6)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.4g}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _print_scores(results: EvalResults, scores: list[str], console: Console, few: bool) -> None:
    """A task's forms with all scores, a line each or where these are many a column each, its paired differences in the
    score it is known by, and reports."""
    lines = [["form", "loss", *scores, "seconds"]]
    for name, form in results.forms.items():
        cells = [_cell(found, 3, few=few) for found in (form.loss, *(form.scores[score] for score in scores))]
        lines.append([name, *cells, f"{form.seconds:.1f}"])
    if len(scores) > MOST_COLUMNS:
        lines = [list(line) for line in zip(*lines)]
    table = Table(title=f"{results.rows} held-out rows, 95% intervals", title_justify="left")
    table.add_column(lines[0][0])
    for heading in lines[0][1:]:
        table.add_column(heading, justify="right")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)
    if pairs := [pair for pair in results.pairs if pair.metric == scores[0]]:
        console.print(_pair_table(pairs, few, points=False))
    for name, form in results.forms.items():
        if report := form.details.get("report"):
            console.print(f"{name}\n{report}", markup=False, highlight=False)
    for note in {form.details["note"]: None for form in results.forms.values() if "note" in form.details}:
        console.print(note, markup=False, highlight=False)


def _score_names(results: EvalResults) -> list[str]:
    return list(next((form.scores for form in results.forms.values()), {}))


def _pair_table(pairs: list[PairResult], few: bool, points: bool = True) -> Table:
    """`points`: differences of accuracy in hundredths."""
    table = Table(title="Paired differences on the same rows, 95% intervals", title_justify="left")
    for heading, justify in (("pair", "left"), ("metric", "left"), ("difference", "right"), ("other answers", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for pair in pairs:
        in_points = points and pair.metric == "accuracy"
        scale, digits = (100, 1) if in_points else (1, 3)
        interval = Interval(pair.difference, pair.low, pair.high)
        mark = "" if interval.excludes_zero and not few else " (may be 0)"
        other = "-" if pair.disagree is None else f"{100 * pair.disagree:.1f}% of rows"
        name = "accuracy (points)" if in_points else pair.metric
        table.add_row(f"{pair.a} - {pair.b}", name, _cell(interval, digits, scale, "+", few) + mark, other)
    return table


def _cell(interval: Interval, digits: int, scale: float = 1, sign: str = "", few: bool = False) -> str:
    value, low, high = (scale * number for number in (interval.value, interval.low, interval.high))
    if few:
        return f"{value:{sign}.{digits}f} -"
    return f"{value:{sign}.{digits}f} \\[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _tree(results: EvalResults) -> dict[str, Any]:
    """Plain data; what only some tasks have is left out elsewhere."""
    tree = asdict(results)
    for form in tree["forms"].values():
        for name in ("scores", "details"):
            if not form[name]:
                del form[name]
    return tree


def _form_from_tree(tree: dict[str, Any]) -> FormResult:
    accuracy, perplexity = (_interval_or_none(tree[name]) for name in ("accuracy", "perplexity"))
    scores = {name: Interval(**ends) for name, ends in tree.get("scores", {}).items()}
    return FormResult(
        Interval(**tree["loss"]),
        perplexity,
        accuracy,
        tree["rows"],
        tree["seconds"],
        PerRow(**tree["per_row"]),
        scores,
        tree.get("details", {}),
    )


def _interval_or_none(tree: dict[str, float] | None) -> Interval | None:
    return None if tree is None else Interval(**tree)
