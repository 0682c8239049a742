"""CoNLL files: a word and its tag a line, in the first and the last column; blank lines between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.data.raw_rows import WHITE_SPACE, RawRow, numbered_lines, text_file

ENDINGS = (".conll", ".iob", ".iob2", ".bio", ".annotated")
_TAB, _SPACES = re.compile("\t"), re.compile("[ \t]+")  # of ASCII: words may hold other white space
_TAG = re.compile(r"^(O|[BI]-\S+)$")


def conll_rows(path: Path) -> Iterator[RawRow]:
    """Rows with `words` and `tags`, numbered by the line where the sentence starts.

    Columns are parted by tabs where the first word's line has one, otherwise by spaces; all lines have as many as
    that one. A file with one column gives rows without `tags`, for prediction. Passed over: -DOCSTART- lines, and
    lines that start with `# ` and have another number of columns.

    Raises:
        DataError: the file is missing, empty or UTF-16.
    """
    columns = _Columns()
    sentence: list[list[str]] = []
    problem, start = None, 0
    for number, line in chain(numbered_lines(text_file(path)), [(0, "")]):
        cells = line if isinstance(line, RowError) else columns.of(line)
        if cells == []:
            if problem or sentence:
                yield RawRow(start, problem or columns.row(sentence))
            sentence, problem, start = [], None, 0
        elif cells is not None:
            start = start or number
            if isinstance(cells, RowError):
                problem = problem or cells.at(f"line {number}")
            else:
                sentence.append(cells)


def looks_like_conll(path: Path) -> bool:
    """True for a .txt file whose first word's line has a tab in it, or ends in O, B-TYPE or I-TYPE."""
    if path.suffix.lower() != ".txt" or not path.is_file():
        return False
    columns = _Columns()
    for _, line in numbered_lines(path):
        cells = None if isinstance(line, RowError) else columns.of(line)
        if isinstance(cells, list) and cells:
            return len(cells) > 1 and (columns.separator is _TAB or bool(_TAG.match(cells[-1])))
    return False


class _Columns:
    """Splits lines as the first word's line shows it."""

    def __init__(self) -> None:
        self.width = 0
        self.separator = _TAB

    def of(self, line: str) -> list[str] | RowError | None:
        """The cells of a word's line; none of a blank line; None for a line to pass over."""
        line = line.rstrip(WHITE_SPACE)
        if not line:
            return []
        if line.startswith("-DOCSTART-"):
            return None
        if not self.width:
            if line.startswith("# "):
                return None
            self.separator = _TAB if "\t" in line else _SPACES
            self.width = len(self.separator.split(line))
        cells = self.separator.split(line)
        if len(cells) == self.width:
            return cells if cells[0].strip() else RowError("no word before its tag", reason="no word", got=line)
        if line.startswith("# "):
            return None
        return self._wrong(line, len(cells))

    def row(self, sentence: list[list[str]]) -> dict[str, Any]:
        """The cells of a sentence as a row."""
        words = {"words": [cells[0] for cells in sentence]}
        return words if self.width == 1 else words | {"tags": [cells[-1] for cells in sentence]}

    def _wrong(self, line: str, width: int) -> RowError:
        what = "a word without tag" if width == 1 else f"{width} columns"
        parted = "tabs" if self.separator is _TAB else "white space"
        return RowError(
            f"{what}, where the lines before have {self.width} columns (parted by {parted})",
            reason="wrong number of columns",
            got=line,
            fix="A comment starts with '# '; a sentence ends with a blank line",
        )
