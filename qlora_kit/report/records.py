"""Reads what a run left behind, however it ended: a torn line or a missing file is told, never fatal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError

Record = dict[str, Any]
RUN_FILES = ("recipe.yaml", "manifest.json", "metrics.jsonl")


@dataclass
class RunRecords:
    """Everything the report shows. Lists are in the order of steps; what is missing is empty.

    Attributes:
        train, evals: lines of metrics.jsonl by kind; of a step logged twice (killed, then resumed) the later.
        results: eval/results.json.
        problems: what could not be read, in words.
    """

    name: str
    recipe: str = ""
    manifest: Record = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    results: Record = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: Path) -> RunRecords:
    """Everything in a run folder that a report can show.

    Raises:
        RunError: there is no such folder, or it holds none of a run's files.
    """
    if not any((run_dir / name).is_file() for name in RUN_FILES):
        raise RunError(
            f"{run_dir} is no run folder", allowed=f"a folder with {', '.join(RUN_FILES)}", fix="Check the path"
        )
    records = RunRecords(run_dir.name)
    recipe = _text(run_dir / "recipe.yaml", records.problems)
    records.recipe = recipe or ""
    records.manifest = _json(run_dir / "manifest.json", dict, records.problems) or {}
    samples = _json(run_dir / "samples.json", list, records.problems, optional=True) or []
    records.samples = [sample for sample in samples if isinstance(sample, dict)]
    records.results = _json(run_dir / "eval" / "results.json", dict, records.problems, optional=True) or {}
    _read_metrics(run_dir / "metrics.jsonl", records)
    return records


def number(record: Record, key: str) -> float | None:
    """A finite number of a record, or None: a field may be null, NaN or of another type in a run that went wrong."""
    value = record.get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _read_metrics(path: Path, records: RunRecords) -> None:
    text = _text(path, records.problems)
    by_kind: dict[str, dict[float, Record]] = {"train": {}, "eval": {}}
    damaged = 0
    for line in (text or "").splitlines():
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            damaged += 1
        elif record["kind"] in by_kind:
            by_kind[record["kind"]][record["step"]] = record
    if damaged:
        records.problems.append(f"metrics.jsonl: {damaged} unreadable line(s); a kill can tear the last one")
    records.train = [by_kind["train"][step] for step in sorted(by_kind["train"])]
    records.evals = [by_kind["eval"][step] for step in sorted(by_kind["eval"])]


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record and number(record, "step") is not None else None


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror or error}")
        return None


def _json(path: Path, kind: type, problems: list[str], optional: bool = False) -> Any:
    if optional and not path.exists():
        return None
    text = _text(path, problems)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return None
    if not isinstance(value, kind):
        problems.append(f"{path.name} holds a {type(value).__name__} instead of a {kind.__name__}")
        return None
    return value
