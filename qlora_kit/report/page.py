"""report.html of a run: one file, no script, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from qlora_kit.atomic import write_atomically
from qlora_kit.eval.intervals import FEWEST_ROWS
from qlora_kit.report.chart import Chart, Point, Series, smooth
from qlora_kit.report.records import Record, RunRecords, number, read_run

GIB = 2**30
_SMOOTH_FROM = 40  # fewer points are read more easily as they are
_SHOWN_BY_THEMSELVES = {"format", "name", "status", "results", "data", "base", "tools", "machine", "notes"}


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from whatever the run folder holds, finished or interrupted. Returns its path.

    Raises:
        RunError: there is no such folder, or it holds none of a run's files.
    """
    html = render_report(read_run(run_dir))
    path = run_dir / "report.html"
    write_atomically(path, html)
    return path


def render_report(records: RunRecords) -> str:
    """The page's HTML; all text of the run is escaped."""
    manifest = records.manifest
    return page_template("report.html").render(
        records=records,
        name=manifest.get("name") or records.name,
        status=str(manifest.get("status") or "unknown"),
        tiles=_tiles(records),
        charts=[(chart.title, svg) for chart in _charts(records) if (svg := chart.svg())],
        notes=_list(manifest.get("notes")),
        environment={key: manifest[key] for key in ("machine", "tools", "base") if manifest.get(key)},
        data=manifest.get("data") or {},
        other={key: value for key, value in manifest.items() if key not in _SHOWN_BY_THEMSELVES},
        columns=_columns(records.results),
        forms=_forms(records.results),
        pairs=_pairs(records.results),
    )


def page_template(name: str) -> Template:
    """A page of this folder; it escapes all text."""
    environment = Environment(
        loader=PackageLoader("qlora_kit.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["readable"] = readable
    return environment.get_template(name)


def readable(value: object, key: str = "") -> str:
    """A value in words people read: bytes in GiB, seconds in hours, floats to four digits, integers in thousands."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if key.endswith("bytes"):
        return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"
    if key in ("wall_s", "elapsed_s", "seconds"):
        hours, minutes = divmod(int(value) // 60, 60)
        return (
            f"{hours} h {minutes} min"
            if hours
            else f"{minutes} min {value % 60:.0f} s"
            if minutes
            else f"{value:.1f} s"
        )
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _tiles(records: RunRecords) -> list[tuple[str, str, str]]:
    """(heading, value, remark), from the manifest's results or, of a run that was cut off, from its metrics."""
    results = _mapping(records.manifest.get("results"))
    last = records.train[-1] if records.train else {}
    scored = [(loss, record) for record in records.evals if (loss := number(record, "loss")) is not None]
    best_loss, best = min(scored, key=lambda pair: pair[0]) if scored else (None, {})
    best_loss = _first(number(results, "best_eval_loss"), best_loss)
    best_step = _first(number(results, "best_step"), best.get("step"))
    perplexity = f"perplexity {math.exp(best_loss):.3g}" if best_loss is not None and best_loss < 700 else ""
    peak = _first(number(results, "peak_rss_bytes"), max(_column(records.train, "rss_bytes"), default=None))
    gpu_peak = max(_column(records.train, "gpu_bytes"), default=None)
    speeds = _column(records.train, "tokens_per_s")
    speed = _first(number(results, "tokens_per_s"), sum(speeds) / len(speeds) if speeds else None)
    wall = _first(number(results, "wall_s"), number(last, "elapsed_s"))
    return [
        ("steps", readable(_first(records.manifest.get("step"), last.get("step"))), ""),
        ("train loss, last", readable(number(last, "loss")), "nats a token"),
        ("eval loss, best", readable(best_loss), f"step {readable(best_step)}; {perplexity}" if perplexity else ""),
        ("tokens/s", readable(speed), "mean"),
        ("peak memory", readable(peak, "bytes"), f"GPU {readable(gpu_peak, 'bytes')}" if gpu_peak else "host"),
        ("wall time", readable(wall, "wall_s"), ""),
        ("trained weights", readable(results.get("trainable_params")), ""),
    ]


def _charts(records: RunRecords) -> Iterable[Chart]:
    train, resumes = records.train, [step for step in _list(records.manifest.get("resumes")) if isinstance(step, int)]
    losses, noisy = _points(train, "loss"), len(train) >= _SMOOTH_FROM
    raw = Series("train", losses, faint=noisy)
    smoothed = [Series("train, smoothed", smooth(losses))] if noisy else []
    evaluated = Series("eval", _points(records.evals, "loss"), "s2", dots=True)
    yield Chart("Loss", "loss (nats per token)", [raw, *smoothed, evaluated], marks=resumes)
    yield Chart("Learning rate", "learning rate", [Series("lr", _points(train, "lr"))], from_zero=True)
    yield Chart("Gradient norm", "gradient norm, before clipping", [Series("norm", _points(train, "grad_norm"))], True)
    memory = [Series("host (RSS)", _points(train, "rss_bytes", GIB))]
    if _column(train, "gpu_bytes"):
        memory.append(Series("GPU", _points(train, "gpu_bytes", GIB), "s2"))
    yield Chart("Memory", "memory (GiB)", memory, from_zero=True)
    yield Chart("Speed", "tokens per second", [Series("tokens/s", _points(train, "tokens_per_s"))], from_zero=True)


def _points(records: list[Record], key: str, unit: float = 1.0) -> list[Point]:
    """A value that is missing becomes NaN, which breaks the line."""
    values = ((record["step"], number(record, key)) for record in records)
    return [(step, math.nan if value is None else value / unit) for step, value in values]


def _columns(results: Record) -> list[str]:
    """Headings of the evaluation table: of a task the loss and its scores."""
    scores = _scores(results)
    return ["loss", *scores] if scores else ["loss (nats/token)", "perplexity", "accuracy (%)"]


def _forms(results: Record) -> list[dict[str, Any]]:
    """Rows of the evaluation table: form name and `value [low, high]` a metric."""
    scores, rows = _scores(results), []
    for name, form in _mapping(results.get("forms")).items():
        form = _mapping(form)
        how_of = {"loss": (1, 3)} | dict.fromkeys(scores, (1, 3)) if scores else _CELLS
        values = form | _mapping(form.get("scores"))
        cells = [_interval(values.get(key), *how, few=_few(results)) for key, how in how_of.items()]
        report = _mapping(form.get("details")).get("report")
        rows.append(
            {"name": name, "cells": cells, "rows": form.get("rows"), "seconds": form.get("seconds"), "report": report}
        )
    return rows


def _scores(results: Record) -> list[str]:
    """Names of the scores of a task; none of causal language modelling."""
    forms = [_mapping(form) for form in _mapping(results.get("forms")).values()]
    return list(dict.fromkeys(name for form in forms for name in _mapping(form.get("scores"))))


def _pairs(results: Record) -> list[dict[str, Any]]:
    """Rows of the table of paired differences; accuracy in points, disagreement in % of rows."""
    rows, of_task = [], bool(_scores(results))
    for pair in map(_mapping, _list(results.get("pairs"))):
        metric = str(pair.get("metric"))
        in_points = metric == "accuracy" and not of_task
        ends = {"value": pair.get("difference"), "low": pair.get("low"), "high": pair.get("high")}
        other = number(pair, "disagree")
        rows.append(
            {
                "name": f"{pair.get('a')} − {pair.get('b')}",
                "metric": "accuracy (points)" if in_points else metric,
                "difference": _interval(ends, *((100, 1) if in_points else (1, 3)), few=_few(results)),
                "disagree": "–" if other is None else f"{100 * other:.1f}",
            }
        )
    return rows


_CELLS = {"loss": (1, 3), "perplexity": (1, 2), "accuracy": (100, 1)}


def _few(results: Record) -> bool:
    return (rows := number(results, "rows")) is not None and rows < FEWEST_ROWS


def _interval(value: object, scale: float, digits: int, few: bool) -> str:
    ends = [number(_mapping(value), key) for key in ("value", "low", "high")]
    if any(end is None for end in ends):
        return "–"
    middle, low, high = (f"{scale * end:.{digits}f}" for end in ends if end is not None)
    return f"{middle} –" if few else f"{middle} [{low}, {high}]"


def _column(records: list[Record], key: str) -> list[float]:
    return [value for record in records if (value := number(record, key)) is not None]


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _mapping(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
