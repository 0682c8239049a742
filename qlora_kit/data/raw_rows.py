"""A row as it stands in its source, and the lines of UTF-8 text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.errors import DataError

WHITE_SPACE = " \t\n\r\v\f"  # of ASCII: a line with any other is not blank
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its source, or why it could not be read."""

    number: int
    value: dict[str, Any] | RowError


def existing(path: Path) -> Path:
    """The path.

    Raises:
        DataError: it is no file, or an empty one.
    """
    if not path.is_file():
        raise DataError(f"no file {path}", fix=f"Check the path; relative paths start at {Path.cwd()}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)", fix="Check that it was written completely")
    return path


def text_file(path: Path) -> Path:
    """The path.

    Raises:
        DataError: it is no file, an empty one, or UTF-16.
    """
    with existing(path).open("rb") as file:
        head = file.read(2)
    if head in _UTF16_MARKS:
        raise DataError(
            f"{path} is UTF-16, not UTF-8", fix=f"Convert it: iconv -f UTF-16 -t UTF-8 {path} > converted{path.suffix}"
        )
    return path


def numbered_lines(path: Path) -> Iterator[tuple[int, str | RowError]]:
    """Lines from 1 with their ends; an error in the place of a line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, RowError(_byte(line, error), reason="not UTF-8", fix=_convert(path))


def not_utf8(path: Path) -> DataError:
    """The error for a file that is not UTF-8 as a whole; names its first such line."""
    for number, line in numbered_lines(path):
        if isinstance(line, RowError):
            return DataError(f"{path} row {number}: {line.problem}", **line.details)
    return DataError(f"{path} is not UTF-8", fix=_convert(path))


def _byte(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"


def _convert(path: Path) -> str:
    return f"Convert the file, for example: iconv -f LATIN1 -t UTF-8 {path} > converted{path.suffix}"
