"""Parallel text: two files, where line N of one means line N of the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.data.examples import RowError
from qlora_kit.data.raw_rows import RawRow, numbered_lines, text_file
from qlora_kit.errors import DataError

_PAIR = re.compile(r"^(.*)\{([^{},]+),([^{},]+)\}(.*)$")


def parallel_files(path: str) -> tuple[Path, Path] | None:
    """Source and target file of `data/train.{en,de}`; None for a path without such a brace."""
    found = _PAIR.match(path)
    if found is None:
        return None
    before, source, target, after = found.groups()
    return Path(f"{before}{source}{after}"), Path(f"{before}{target}{after}")


def parallel_rows(source: Path, target: Path) -> Iterator[RawRow]:
    """Rows with `source` and `target`, numbered by line; lines that are blank on both sides are passed over.

    Raises:
        DataError: a file is missing, empty or UTF-16, or they differ in their number of lines.
    """
    lines = [_count(text_file(path)) for path in (source, target)]
    if lines[0] != lines[1]:
        raise DataError(
            f"{source} has {lines[0]} lines, {target} has {lines[1]}",
            allowed="line N of one with line N of the other",
            fix="Find the line that is missing; an empty line keeps the place",
        )
    for (number, left), (_, right) in zip(numbered_lines(source), numbered_lines(target)):
        if isinstance(left, RowError):
            yield RawRow(number, left.at(source.name))
        elif isinstance(right, RowError):
            yield RawRow(number, right.at(target.name))
        elif left.strip() and right.strip():
            yield RawRow(number, {"source": left.strip(), "target": right.strip()})
        elif left.strip() or right.strip():
            empty, full = (target, source) if left.strip() else (source, target)
            problem = f"empty in {empty.name}, but not in {full.name}"
            yield RawRow(number, RowError(problem, reason="empty side", fix="Empty both, or set data.bad_rows: skip"))


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
