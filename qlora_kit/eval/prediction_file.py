"""A file of predictions that grows row by row, and goes on where a killed call stopped: its whole rows are kept."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

from qlora_kit.atomic import disk_error, write_json
from qlora_kit.errors import EvalError

ENDINGS = (".csv", ".jsonl")


class PredictionFile:
    """A .csv or .jsonl file, opened to append to it. NaN and infinities are written as null.

    Beside it lies NAME.made-by.json: what the rows were made of, so that nothing else is appended to them.

    Attributes:
        rows: whole rows in the file.

    Args:
        path: the file.
        made_by: what its rows are made of (input, model); plain data.
        overwrite: begin again where the file exists.
        also_from: {name: value} in which the makings of an existing file may differ; they are replaced.

    Raises:
        EvalError: another ending, no folder, or an existing file that is not of these makings or is damaged.
    """

    def __init__(
        self,
        path: Path,
        made_by: dict[str, Any],
        overwrite: bool = False,
        also_from: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if path.suffix.lower() not in ENDINGS:
            raise EvalError(f"{path}: unknown ending for predictions", got=path.suffix, allowed=", ".join(ENDINGS))
        if not path.parent.is_dir():
            raise EvalError(f"there is no folder {path.parent} to write {path.name} to", fix="Make it first")
        self.path, self.is_csv = path, path.suffix.lower() == ".csv"
        self.made_by_file = path.with_name(f"{path.name}.made-by.json")
        self.header: list[str] | None = None
        self.rows = 0
        if path.exists() and not overwrite:
            self._check(made_by, also_from)
            self._keep_whole_rows()
        else:
            path.unlink(missing_ok=True)
        write_json(self.made_by_file, made_by)
        self._file: BinaryIO | None = None

    def __enter__(self) -> PredictionFile:
        self._file = self.path.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is not None and not self.rows:  # nothing to go on with
            self.path.unlink(missing_ok=True)
            self.made_by_file.unlink(missing_ok=True)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows, each with the columns of the first one where the file is a CSV.

        Raises:
            EvalError: a row of a CSV has other columns; RunError: the disk is full.
        """
        if not rows:
            return
        text = self._csv(rows) if self.is_csv else "".join(_json(row) + "\n" for row in rows)
        assert self._file is not None, "open it with `with`"
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.rows += len(rows)

    def _csv(self, rows: Sequence[dict[str, Any]]) -> str:
        out = io.StringIO()
        if self.header is None:
            self.header = list(rows[0])
            _write(out, self.header)
        for number, row in enumerate(rows, self.rows + 1):
            if set(row) != set(self.header):
                raise EvalError(
                    f"row {number} for {self.path} has other columns than the first",
                    got=list(row),
                    allowed=", ".join(self.header),
                    fix="Write to a .jsonl file",
                )
            _write(out, [_cell(row[column]) for column in self.header])
        return out.getvalue()

    def _check(self, made_by: dict[str, Any], also_from: Mapping[str, Any]) -> None:
        again = "Give another --output, or --overwrite to begin it again"
        try:
            before = json.loads(self.made_by_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EvalError(f"{self.path} exists and does not come from predict", fix=again) from None
        except ValueError as error:
            raise EvalError(f"{self.made_by_file} is damaged: {error}", fix=again) from None
        for name, value in made_by.items():
            was = before.get(name) if isinstance(before, dict) else None
            if was not in (value, also_from.get(name, value)):
                raise EvalError(f"{self.path} belongs to another {name}", got=was, allowed=str(value), fix=again)

    def _keep_whole_rows(self) -> None:
        """Counts whole rows, and cuts off what a kill left of the next. A quoted cell may span lines."""
        whole = records = quotes = 0
        first = b""
        with self.path.open("rb") as file:
            for line in file:
                quotes += line.count(b'"') if self.is_csv else 0
                if not records:
                    first += line
                if line.endswith(b"\n") and quotes % 2 == 0:
                    whole, records = file.tell(), records + 1
        os.truncate(self.path, whole)
        if self.is_csv and records:
            self.header = next(csv.reader(io.StringIO(first.decode(), newline="")))
            records -= 1
        self.rows = records


def _write(out: io.StringIO, cells: list[str]) -> None:
    torn = any("\r" in cell for cell in cells)  # a bare one ends a row for readers, but csv quotes none
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL if torn else csv.QUOTE_MINIMAL).writerow(cells)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = _json(value)
    return "" if text == "null" else text


def _json(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
