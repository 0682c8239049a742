"""How cells of a table are separated and quoted: training and running read it alike."""

import csv
from pathlib import Path
from typing import Literal


def delimiter_of(path: Path) -> str:
    """A tab for .tsv; otherwise a comma, or the semicolon of spreadsheets whose decimal sign is the comma.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    return ";" if ";" in header and "," not in header else ","


def tsv_quoting(path: Path) -> Literal[0, 3]:
    """csv.QUOTE_MINIMAL where each quoted cell closes on its own line, otherwise csv.QUOTE_NONE.

    Files such as GLUE's quote nothing: a text that begins with a quote would take in the lines behind it.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        closed = all(_closes(line) for line in file if '"' in line)
    return csv.QUOTE_MINIMAL if closed else csv.QUOTE_NONE


def _closes(line: str) -> bool:
    try:
        list(csv.reader([line.rstrip("\r\n")], delimiter="\t", strict=True))
    except csv.Error:
        return False
    return True
