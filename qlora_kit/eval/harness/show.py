"""Benchmark scores as a table in the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_kit.eval.harness.pairs import Pair, compare_scores, rows_of, why_not_comparable
from qlora_kit.eval.harness.results import Benchmarks, Metric, TaskScore, headings
from qlora_kit.eval.intervals import FEWEST_ROWS

_COLORS = ("#2a6fb0", "#d1762a", "#3c8c4a", "#8a5aa8", "#b03a48", "#6b6b6b")


def print_benchmarks(forms: Benchmarks, console: Console) -> None:
    """One line a metric and form, then the paired differences. Tasks of a group are in the file alone."""
    table = Table(title="Benchmarks, 95% intervals", title_justify="left")
    for heading in ("task", "metric", "form"):
        table.add_column(heading)
    for heading in ("score", "rows", "examples"):
        table.add_column(heading, justify="right")
    for task, metric, form, score in lines(forms):
        rows = str(score.rows) if score.rows == score.rows_in_all else f"{score.rows} of {score.rows_in_all}"
        shots = "-" if score.few_shot is None else str(score.few_shot)
        table.add_row(task, metric, form, score_cell(score.metrics[metric]), rows, shots)
    console.print(table)
    if pairs := benchmark_pairs(forms):
        console.print(pair_table(pairs))


def lines(forms: Benchmarks) -> list[tuple[str, str, str, TaskScore]]:
    """(task, metric, form, score), task by task and within it metric by metric."""
    everything = {name: score for scores in forms.values() for name, score in scores.items()}
    return [
        (task, metric, form, scores[task])
        for task in headings(everything)
        for metric in everything[task].metrics
        for form, scores in forms.items()
        if task in scores and metric in scores[task].metrics
    ]


def benchmark_pairs(forms: Benchmarks) -> list[Pair]:
    """Tuned less the bases, and what was made from it less tuned, wherever both were asked the same."""
    names = [("tuned", form) for form in forms if form.startswith("base")]
    names += [(form, "tuned") for form in forms if form.startswith(("merged", "bundle"))]
    found = []
    for a, b in names:
        if a in forms and b in forms:
            found += common_pairs((a, forms[a]), (b, forms[b]))
    return found


def common_pairs(a: tuple[str, dict[str, TaskScore]], b: tuple[str, dict[str, TaskScore]]) -> list[Pair]:
    """The paired differences of all that two forms were asked alike: (name, scores by task) each."""
    return [
        compare_scores(a, b, task, metric)
        for task in headings(a[1])
        if task in b[1] and why_not_comparable(a[1][task], b[1][task]) is None
        for metric in a[1][task].metrics
        if metric in b[1][task].metrics
        and len(rows_of(a[1], task, metric)) == len(rows_of(b[1], task, metric)) >= FEWEST_ROWS
    ]


def pair_table(pairs: list[Pair]) -> Table:
    table = Table(title="Paired differences on the same rows, 95% intervals", title_justify="left")
    for heading in ("task", "metric", "pair"):
        table.add_column(heading)
    for heading in ("difference", "rows"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        scale, unit = (100, " points") if pair.share else (1, "")
        ends = " to ".join(f"{scale * end:+.4g}" for end in (pair.low, pair.high))
        mark = "" if pair.low > 0 or pair.high < 0 else ", may be 0"
        cell = f"{scale * pair.difference:+.4g}{unit} ({ends}{mark})"
        table.add_row(pair.task, pair.metric, f"{pair.a} - {pair.b}", cell, str(pair.rows))
    return table


def score_cell(metric: Metric) -> str:
    """`61.2% (58.0 to 64.4)`; without an interval where there is none."""
    scale, unit = (100, "%") if metric.share else (1, "")
    value = f"{scale * metric.value:.4g}{unit}"
    if metric.low is None or metric.high is None:
        return value
    return f"{value} ({scale * metric.low:.4g} to {scale * metric.high:.4g})"


def plot_benchmarks(forms: Benchmarks, path_png: Path) -> Path:
    """Draws a panel for each task and metric, with a point and a 95% interval for each form."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[str, Metric]] = {}
    for task, metric, form, score in lines(forms):
        panels.setdefault((task, metric), {})[form] = score.metrics[metric]
    columns = min(3, len(panels))
    grid = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, grid * (1.0 + 0.32 * len(forms))), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(grid, columns, squeeze=False).flatten()
    for axes, ((task, metric), by_form) in zip(places, panels.items()):
        _draw_panel(axes, f"{task}: {metric}", by_form, list(forms))
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path_png, dpi=150)
    return path_png


def _draw_panel(axes: Any, title: str, by_form: dict[str, Metric], forms: list[str]) -> None:
    for form, metric in by_form.items():
        scale, place = 100 if metric.share else 1, forms.index(form)
        color = _COLORS[place % len(_COLORS)]
        if metric.low is not None and metric.high is not None:
            axes.hlines(place, scale * metric.low, scale * metric.high, color=color, linewidth=2)
        axes.plot([scale * metric.value], [place], "o", color=color)
    axes.set_yticks(range(len(forms)), forms)
    axes.invert_yaxis()
    one = next(iter(by_form.values()))
    unit, better = ", %" if one.share else "", "higher" if one.higher_is_better else "lower"
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(f"{better} is better{unit}", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
