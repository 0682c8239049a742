"""Rows from files and hub datasets, numbered as a person would count them.

Row numbers are line numbers in JSONL, CSV and TSV (a CSV's header is line 1), and positions from 1 in
JSON, Parquet and hub datasets. A row that cannot be read is handed on as a `RowError` in its place, so
that one broken line can be skipped without losing the rest; a file that cannot be read raises.

Formats that only some tasks have (CoNLL, SQuAD, parallel text, folders of images) are in `task_readers`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_runtime.tsv import delimiter_of, tsv_quoting

from qlora_kit.data.examples import RowError
from qlora_kit.data.raw_rows import WHITE_SPACE, RawRow, existing, not_utf8, numbered_lines, text_file
from qlora_kit.data.task_readers.choose import task_reader
from qlora_kit.data.task_readers.squad import is_squad, squad_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSource

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w.+\[\]:%-]+)?$")


def is_file_source(source: DataSource) -> bool:
    """True for a path with one of ENDINGS, one of a task's formats, or one that exists; False for a hub id.

    Raises:
        DataError: a revision of a file, a folder, a file of another kind, or neither a path nor a hub id.
    """
    path = Path(source.path)
    reads = task_reader(source.path) is not None
    if path.is_dir() and not reads:
        raise DataError(f"{path} is a folder", allowed=f"one file ({', '.join(ENDINGS)})", fix="Name the file in it")
    if reads or path.suffix.lower() in ENDINGS:
        if source.revision is not None:
            problem = f"revision means a hub id's version; {path} is a file"
            raise DataError(problem, got=source.revision, fix="Leave revision out")
        return True
    if path.exists():
        raise DataError(f"{path}: unknown file ending", got=path.suffix, allowed=", ".join(ENDINGS))
    if _HUB_ID.match(source.path):
        return False
    raise DataError(
        f"no data at {path}", allowed=f"a file ({', '.join(ENDINGS)}) or a hub id (owner/name[:config][@split])"
    )


def read_rows(source: DataSource, *, streaming: bool = False) -> Iterator[RawRow]:
    """All rows of a source in order.

    Args:
        source: a file, two of parallel text, a folder of images, or a hub id (`owner/name`, with `:config` and
            `@split` where needed).
        streaming: read a hub dataset over the network as it goes instead of downloading it first.

    Raises:
        DataError: the source is missing, empty, not UTF-8, or not of its kind.
    """
    if is_file_source(source):
        reader = task_reader(source.path)
        rows = reader.rows() if reader else _file_rows(Path(source.path))
    else:
        from qlora_kit.data.hub import hub_rows

        rows = (RawRow(number, value) for number, value in enumerate(hub_rows(source, streaming), 1))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source.path} holds no rows", fix="Check that it was written completely")


def fingerprint(source: DataSource, *, streaming: bool = False) -> str:
    """`sha256:...` of a file's bytes, or of names and bytes where there are several; of a hub dataset see
    `hub_fingerprint`.

    Raises:
        DataError: the source is missing.
    """
    if is_file_source(source):
        reader = task_reader(source.path)
        return f"sha256:{_digest(reader.files() if reader else [Path(source.path)])}"
    from qlora_kit.data.hub import hub_fingerprint

    return hub_fingerprint(source, streaming)


def _digest(files: list[Path]) -> str:
    import hashlib

    digests = {}
    for path in files:
        with existing(path).open("rb") as file:
            digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(files) == 1:
        return digests[str(files[0])]
    start = len(os.path.commonpath(files)) if files else 0  # a folder may move
    return hashlib.sha256("".join(f"{path[start:]} {sha}\n" for path, sha in digests.items()).encode()).hexdigest()


def _file_rows(path: Path) -> Iterator[RawRow]:
    readers = {".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
    return readers.get(path.suffix.lower(), _jsonl_rows)(text_file(path))


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    for number, line in numbered_lines(path):
        if isinstance(line, RowError):
            yield RawRow(number, line)
        elif line.strip(WHITE_SPACE):
            yield RawRow(number, _jsonl_value(line))


def _jsonl_value(line: str) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return RowError(f"broken JSON: {error}", reason="broken JSON", fix="Each line must hold one complete object")
    return _object(value)


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    shown = repr(value)
    got = shown if len(shown) <= 60 else shown[:57] + "..."
    return RowError(
        f"row is a {type(value).__name__}, not an object: {got}", reason="no object", allowed='{"column": value, ...}'
    )


def _json_rows(path: Path) -> Iterator[RawRow]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (json.JSONDecodeError, RecursionError) as error:
        lines = "Extra data" in str(error)
        fix = "It looks like JSON Lines: rename it to .jsonl" if lines else "Mend the place named above"
        raise DataError(f"{path}: broken JSON: {error}", fix=fix) from None
    if is_squad(tree):
        yield from squad_rows(tree)
        return
    if isinstance(tree, dict):
        lists = {key: value for key, value in tree.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise DataError(
                f"{path} is an object with {len(lists)} lists",
                got=list(tree)[:8],
                allowed="a list of rows, or an object with one list",
            )
        (tree,) = lists.values()
    if not isinstance(tree, list):
        raise DataError(f"{path} holds a {type(tree).__name__}", allowed="a list of rows, or an object with one list")
    for number, value in enumerate(tree, 1):
        yield RawRow(number, _object(value))


def _csv_rows(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB refuses long documents
    is_tsv = path.suffix.lower() == ".tsv"
    try:
        quoting = tsv_quoting(path) if is_tsv else csv.QUOTE_MINIMAL
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter_of(path), quoting=quoting, strict=True)
            header = _header(next(reader, []), path)
            start = reader.line_num + 1  # a quoted cell may span lines: a row is named by its first
            for cells in reader:
                if cells:
                    yield RawRow(start, _csv_value(header, cells, _TSV_FIX if is_tsv else _CSV_FIX))
                start = reader.line_num + 1
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except csv.Error as error:
        raise DataError(f"{path} row {start}: broken CSV: {error}", fix="Check the quotes from this line on") from None


def _header(cells: list[str], path: Path) -> list[str]:
    doubled = sorted({cell for cell in cells if cells.count(cell) > 1})
    if not cells or doubled or not all(cell.strip() for cell in cells):
        raise DataError(f"{path} row 1: not a header with a different name for each column", got=cells)
    return cells


_CSV_FIX = "Quote cells that hold the separator or a line break"
_TSV_FIX = "Quote cells that hold tabs, each closed on its own line; texts with line breaks need .csv or .jsonl"


def _csv_value(header: list[str], cells: list[str], fix: str) -> dict[str, Any] | RowError:
    if len(cells) == len(header):
        return dict(zip(header, cells))
    many = "too many" if len(cells) > len(header) else "too few"
    return RowError(
        f"{many} cells: {len(cells)}, where the header has {len(header)} ({', '.join(header)})",
        reason="wrong number of cells",
        fix=fix,
    )


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}", fix="Write it again") from None
