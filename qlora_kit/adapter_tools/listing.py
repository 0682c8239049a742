"""Which adapters there are: found below a folder, described from their headers, without their weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from qlora_kit.adapter_tools.sources import run_of
from qlora_kit.adapters.files import CONFIG, WEIGHTS
from qlora_kit.adapters.folders import adapter_folder
from qlora_kit.adapters.methods import METHODS, stored_method
from qlora_kit.errors import AdapterError
from qlora_kit.model.source import sha256_file
from qlora_kit.report.page import readable


@dataclass(frozen=True)
class Listed:
    """A row. `ranks` lists each rank that the configuration names; `problem` says why a field is empty."""

    name: str
    folder: str
    method: str
    ranks: list[int]
    targets: str
    trained_parameters: int | None
    bytes: int
    base: str
    sha256: str
    problem: str


def find_adapters(paths: list[Path]) -> list[Path]:
    """Adapter folders: of each path its own, else those of the folders in it.

    Raises:
        AdapterError: a path holds none.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            raise AdapterError(f"no folder {path}", fix="Give a folder of runs, a run, or an adapter's folder")
        children = (
            [path] if _holds_adapter(path) else sorted(child for child in path.iterdir() if _holds_adapter(child))
        )
        if not children:
            raise AdapterError(f"{path} holds no adapter, and no folder in it does", fix="Train first: qlora-kit train")
        found += [adapter_folder(child) for child in children]
    return list(dict.fromkeys(found))


def _holds_adapter(path: Path) -> bool:
    return any((folder / CONFIG).is_file() for folder in (path, path / "adapter"))


def describe(folder: Path) -> Listed:
    """An adapter's row; a damaged adapter has one too."""
    weights = folder / WEIGHTS
    config, problems = _config(folder / CONFIG)
    method = str(config.get("peft_type", "–"))
    try:
        kind = stored_method(config, folder / CONFIG)
        method = next(name for name, other in METHODS.items() if other is kind)
    except AdapterError as error:
        problems = problems or [str(error)]
    count, problem = _count(weights)
    targets, strange = _targets(config.get("target_modules"))
    ranks, odd = _ranks(config.get("r"), config.get("rank_pattern"))
    return Listed(
        name=_name(folder),
        folder=str(folder),
        method=method,
        ranks=ranks,
        targets=targets,
        trained_parameters=count,
        bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        base=str(config.get("base_model_name_or_path") or "–"),
        sha256=sha256_file(weights) if weights.is_file() else "",
        problem="; ".join([*problems, *problem, *strange, *odd]),
    )


def _targets(value: Any) -> tuple[str, list[str]]:
    """(names as one text, what is wrong with them)."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "–", [f"target_modules: got {value!r}, allowed a name or names"]
    return ", ".join(names) or "–", []


def _ranks(rank: Any, pattern: Any) -> tuple[list[int], list[str]]:
    """(each rank once, rising; what is wrong with them). PEFT's AdaLoRA marks with true the ranks that it kept."""
    if pattern is not None and not isinstance(pattern, dict):
        return [], [f"rank_pattern: got {pattern!r}, allowed names with their ranks"]
    named = (pattern or {}).values()
    values = [sum(value) if _is_marks(value) else value for value in named] + ([] if rank is None else [rank])
    wrong = [value for value in values if type(value) is not int or value < 0]
    return sorted({value for value in values if value not in wrong}), [
        f"rank: got {value!r}, allowed a whole number" for value in wrong
    ]


def _is_marks(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(mark, bool) for mark in value)


def _name(folder: Path) -> str:
    """The run's, with the step of a checkpoint; the folder of an adapter without a run."""
    run = run_of(folder)
    if run is None:
        return str(folder)
    return run.path.name if folder.absolute().parent == run.path else f"{run.path.name} {folder.parent.name}"


def _config(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"{path} is not JSON: {error}"]
    return (config, []) if isinstance(config, dict) else ({}, [f"{path} is not a JSON object"])


def _count(path: Path) -> tuple[int | None, list[str]]:
    """Numbers in a safetensors file, by its header."""
    if not path.is_file():
        return None, [f"{path} is missing"]
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys()), []  # noqa: SIM118
    except SafetensorError as error:
        return None, [f"{path} is damaged: {error}"]


def print_list(rows: list[Listed], console: Console) -> None:
    table = Table()
    for heading in ("adapter", "method", "rank", "targets", "trained", "size", "base", "sha256"):
        wide, right = heading in ("targets", "base"), heading in ("rank", "trained", "size")
        table.add_column(heading, justify="right" if right else "left", no_wrap=not wide, overflow="fold")
    for row in rows:
        ranks = [str(rank) for rank in row.ranks] or ["–"]
        cells = (
            row.name,
            row.method,
            ranks[0] if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
            row.targets if len(row.targets) <= 60 else row.targets[:57] + "...",
            readable(row.trained_parameters),
            readable(row.bytes, "bytes"),
            row.base,
            row.sha256[:12] or "–",
        )
        table.add_row(*map(Text, cells))  # names are no markup
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(f"{row.name}: {row.problem}", style="red", markup=False)
