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

from qlora_kit.adapters.methods import METHODS
from qlora_kit.data.masking import Encoded
from qlora_kit.errors import ExportError
from qlora_kit.export.codes import CODED_BASES
from qlora_kit.export.disk import needed_bytes, require_room
from qlora_kit.export.forms import BITS_8, BUDGET, forms_of
from qlora_kit.export.nbits import BLOCK_SIZE
from qlora_kit.export.run import export_run
from qlora_kit.export.verify import PROFILES
from qlora_kit.plan import plan_recipe
from qlora_kit.plan.export import BESIDE_CODES, CANNOT_MERGE, CODE_BLOCK, CODED_VOCABULARY, LINEAR_BITS
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
    recipe = RunFolder(run).recipe()
    export = recipe.export.model_copy(update={"profiles": profiles, "verify_prompts": 2})
    planned = plan_recipe(recipe.model_copy(update={"export": export}), "cpu")
    tokens = 2 * recipe.data.max_seq_len
    assert planned.export_bytes == needed + (tokens - 3) * vocab * 4, "told before anything is loaded"


def test_the_plans_constants_are_those_of_the_profiles() -> None:
    coded = {name for name in PROFILES if forms_of(name, {}, {}).embeds_codes}
    assert (set(CODED_VOCABULARY), CODE_BLOCK) == (coded, BLOCK_SIZE) and set(LINEAR_BITS) == set(PROFILES)
    assert set(BESIDE_CODES) == set(CODED_BASES)
    assert (LINEAR_BITS["int8"], LINEAR_BITS["int4"]) == (BITS_8, BUDGET)
    assert set(CANNOT_MERGE) == {name for name in METHODS if METHODS[name].cannot_merge}
