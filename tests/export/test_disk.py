"""The disk that an export takes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import changed_copy

from qlora_kit.data.masking import Encoded
from qlora_kit.errors import ExportError
from qlora_kit.export.disk import needed_bytes, require_room
from qlora_kit.export.run import export_run
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

Usage = namedtuple("Usage", "total used free")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed_copy(trained_run, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    with pytest.raises(ExportError, match=r"export may take .* GiB of disk.*got '0.0 GiB free.*lower export.verify_p"):
        export_run(RunFolder(run), Console(quiet=True), ["fp32", "int8"])
    assert not (run / "merged").exists() and not (run / "bundles").exists()


def test_much_is_said(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 80 << 30))
    require_room(RunFolder(trained_run), 1 << 20, Console(file=(text := StringIO()), width=300))
    assert text.getvalue() == ""
    require_room(RunFolder(trained_run), 69 << 30, Console(file=text, width=300))
    assert text.getvalue() == f"takes up to 69.0 GiB of disk in {trained_run}, 80.0 are free\n"


@pytest.mark.parametrize("profiles", [["fp32"], ["int8", "nf4"]])
def test_the_count_covers_what_is_written(exported_run: Path, tmp_path: Path, profiles: list[str]) -> None:
    run = changed_copy(exported_run, tmp_path / "run")
    shutil.rmtree(run / "bundles")
    export_run(RunFolder(run), Console(quiet=True), profiles)
    merged = sum(file.stat().st_size for file in run.glob("merged/*.safetensors")) - (1 << 20)  # its header's room
    written = merged + sum(file.stat().st_size for file in run.glob("bundles/*/onnx/*_data"))
    row, vocab = np.arange(3), 320
    needed = needed_bytes(load_tuned(RunFolder(run)), profiles, [(Encoded(row, row, 0, 0), "held_out")])
    assert written <= needed - 3 * vocab * 4 < 1.6 * written
