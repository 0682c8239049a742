"""Rows in and rows out of the task verbs: CSV, or JSON Lines."""

import csv
import json
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from qlora_runtime.errors import ArgumentError

Row = dict[str, Any]
CSV, JSONL = ".csv", ".jsonl"


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a .csv file with a header or a .jsonl file, one at a time.

    Raises:
        ArgumentError: another ending, or a row that cannot be read; names file and line.
    """
    check_ending(path)
    return _csv_rows(path) if path.suffix == CSV else _json_rows(path)


def check_ending(path: Path) -> None:
    """Raises ArgumentError for a file that is neither .csv nor .jsonl."""
    if path.suffix not in (CSV, JSONL):
        raise ArgumentError(f"{path}: the ending is {path.suffix!r}, allowed are {CSV} and {JSONL}.")


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ArgumentError(f"{place}: the row has not as many cells as the header has columns.")
                yield place, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"{path}, after line {reader.line_num}: no CSV in UTF-8 ({error})."
            ) from error


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ArgumentError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ArgumentError(f"{path}, line {number}: expected an object, got {str(row)[:80]}")
            yield f"{path}, line {number}", row


class RowWriter:
    """Writes rows to a binary file, as CSV or as JSON Lines."""

    def __init__(self, file: BinaryIO, as_csv: bool) -> None:
        self._file, self._as_csv = file, as_csv
        self._writer: Any = None  # csv's writer, once the first row has named the columns

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; in CSV, cells that are no text or number are written as JSON."""
        if not self._as_csv:
            self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            return
        if self._writer is None:
            self._text = TextIOWrapper(self._file, encoding="utf-8", newline="", write_through=True)
            self._writer = csv.DictWriter(self._text, list(row))
            self._writer.writeheader()
        self._writer.writerow({name: _cell(value) for name, value in row.items()})

    def close(self) -> None:
        """Leaves the file to its owner."""
        if self._writer is not None:
            self._text.detach()


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
