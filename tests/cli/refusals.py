"""How a wrong input must end: one typed error that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from qlora_kit.cli import main


def files_in(folder: Path) -> dict[str, str]:
    """File to hash; locks aside, which say nothing."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def refused(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the verb and checks how it ends; `message` is a pattern of what it must say."""
    before = files_in(folder)
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit_:  # what argparse refuses
        code = exit_.code if isinstance(exit_.code, int) else 1
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2, said
    assert "Traceback" not in said and re.search(r"error: |qlora-runtime: \w+Error: ", said), said
    assert re.search(message, said), said
    assert files_in(folder) == before
