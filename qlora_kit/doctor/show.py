"""A diagnosis as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.doctor.judge import Diagnosis

_MARKS = {"ok": ("ok", "green"), "limited": ("limited", "yellow"), "missing": ("MISSING", "bold red")}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Prints one line a finding: what there is, and what that allows."""
    table = Table(title="What this machine has, and what that allows", title_justify="left")
    for heading in ("", "", "found", "allows"):
        table.add_column(heading)
    for finding in diagnosis.findings:
        word, style = _MARKS[finding.status]
        # Text, because a device's name may hold square brackets that rich would read as markup.
        table.add_row(Text(finding.area), Text(word, style), Text(finding.found), Text(finding.allows))
    console.print(table)
    if not diagnosis.ready:
        console.print("Something is missing that training needs; see the lines marked MISSING.", style="bold red")
