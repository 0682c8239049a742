"""Rows in and rows out of the task verbs: CSV, TSV, or JSON Lines."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from qlora_runtime.errors import ArgumentError
from qlora_runtime.tsv import delimiter_of, tsv_quoting

Row = dict[str, Any]
CSV, TSV, JSONL = ".csv", ".tsv", ".jsonl"
_DELIMITERS = {CSV: ",", TSV: "\t"}


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a .csv or .tsv file with a header or a .jsonl file, one at a time.

    Quotes in a .tsv are read as `tsv_quoting` says.

    Raises:
        ArgumentError: another ending, no rows, or a row that cannot be read; names file and line.
    """
    return _some(path, json_rows(path) if ending_of(path) == JSONL else _table_rows(path))


def ending_of(path: Path) -> str:
    """CSV, TSV or JSONL.

    Raises:
        ArgumentError: the file has another ending.
    """
    ending = path.suffix.lower()
    if ending not in (CSV, TSV, JSONL):
        raise ArgumentError(f"{path}: the ending is {path.suffix!r}, allowed are {CSV}, {TSV} and {JSONL}.")
    return ending


def check_writable(place: str, row: Row) -> None:
    """Raises ArgumentError for a row that cannot be written again: JSON reads more than it may hold."""
    for column, value in row.items():
        try:
            _json({column: value}).encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"{place}: column {column!a} holds half a surrogate pair, which is no character. Mend it."
            ) from None
        except (ValueError, RecursionError) as error:
            raise ArgumentError(
                f"{place}: column {column!r} holds what JSON does not have ({error}). Write null for NaN and "
                "infinities."
            ) from None


def _some(path: Path, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ArgumentError(f"{path} holds no rows. Check that it was written completely.")


def _table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB refuses long documents
    line = 1
    try:
        quoting = tsv_quoting(path) if ending_of(path) == TSV else csv.QUOTE_MINIMAL
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter_of(path), quoting=quoting, strict=True)
            header = _header(path, next(reader, []))
            line = reader.line_num + 1  # a quoted cell may span lines: a row is named by its first
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ArgumentError(
                        f"{path}, line {line}: the row has not as many cells as the header has columns: "
                        f"{len(cells)}, not {len(header)}."
                    )
                if cells:
                    yield f"{path}, line {line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise ArgumentError(f"{path}, line {line}: {error}. Check the quotes from this line on.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}, from line {line} on: not UTF-8 ({error}). Convert the file.") from error


def _header(path: Path, cells: list[str]) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        raise ArgumentError(
            f"{path}, line 1: the header is {cells}, expected a different name for each column."
        )
    return cells


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of a JSON Lines file, one at a time; empty lines are passed over.

    Raises:
        ArgumentError: a line is no JSON object; names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ArgumentError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ArgumentError(f"{path}, line {number}: expected an object, got {str(row)[:80]}")
            yield f"{path}, line {number}", row


class RowWriter:
    """Writes rows to a binary file, as CSV, TSV or JSON Lines."""

    def __init__(self, file: BinaryIO, ending: str = JSONL) -> None:
        self._file, self._ending = file, ending
        self._header: list[str] = []  # the first row names the columns
        self._rows = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; in a table, cells that are no text or number are written as JSON.

        Raises:
            ArgumentError: a table's row has other columns than the first, or a cell that a .tsv cannot hold.
        """
        self._rows += 1
        if self._ending == JSONL:
            self._file.write(f"{_json(row)}\n".encode())
            return
        if self._rows == 1:
            self._header = list(row)
            self._write_cells(self._header)
        if set(row) != set(self._header):
            raise ArgumentError(
                f"row {self._rows} has other columns than the first: {list(row)}, not {self._header}. Write "
                f"to a {JSONL} file."
            )
        self._write_cells([_cell(row[column]) for column in self._header])

    def _write_cells(self, cells: list[str]) -> None:
        if self._ending == TSV and any(mark in cell for cell in cells for mark in "\r\n"):
            raise ArgumentError(
                f"row {self._rows} has a line break in a cell, which a {TSV} file cannot hold. Write to a "
                f"{CSV} or {JSONL} file."
            )
        text = StringIO(newline="")
        csv.writer(text, delimiter=_DELIMITERS[self._ending]).writerow(cells)
        self._file.write(text.getvalue().encode())


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
