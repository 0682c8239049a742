"""Merging onto other grounds than the base that was trained against."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tiny_models import save_tiny_model
from tiny_run import changed_copy, train, write_recipe
from transformers import AutoModelForCausalLM

from qlora_kit.cli import main
from qlora_kit.errors import ExportError
from qlora_kit.export.onto import merge_onto
from qlora_kit.export.run import export_run
from qlora_kit.model.int4_blocks import Int4Grid, dequantize_int4, quantize_int4
from qlora_kit.model.quantized import QuantizedLinear, bnb
from qlora_kit.train.restore import load_run_base, load_tuned
from qlora_kit.train.run_folder import RunFolder


def merged(run: RunFolder, onto: Any = "dequantized") -> dict[str, torch.Tensor]:
    model = load_tuned(run)
    assert len(merge_onto(run, model, onto)) == 14
    return {name: weight.detach() for name, weight in model.named_parameters()}


def quantized_names(run: RunFolder) -> dict[str, torch.Tensor]:
    base = load_run_base(run)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, QuantizedLinear)}
    return {f"{name}.weight": module.dequantize(torch.float32) for name, module in layers.items()}


def test_the_original_takes_the_same_delta(trained_run: Path) -> None:
    run = RunFolder.open(trained_run)
    plain, onto_original, dequantized = merged(run), merged(run, "original"), quantized_names(run)
    original = dict(load_run_base(run, "none").named_parameters())
    moved = 0.0
    for name, weight in onto_original.items():
        if name not in dequantized:
            assert torch.equal(weight, plain[name]), name
            continue
        delta, expected = weight - original[name].float(), plain[name] - dequantized[name]
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)
        moved = max(moved, expected.abs().max().item())
    assert moved > 1e-3 and len(dequantized) == 14


def test_requantized_is_the_merged_weight_in_the_bases_codes(trained_run: Path) -> None:
    run = RunFolder.open(trained_run)
    plain, again = merged(run), merged(run, "requantized")
    for name in quantized_names(run):
        codes, state = bnb.functional.quantize_4bit(plain[name], quant_type="nf4", compress_statistics=True)
        torch.testing.assert_close(again[name], bnb.functional.dequantize_4bit(codes, state), atol=1e-6, rtol=0)
        assert not torch.equal(again[name], plain[name])


def test_requantized_takes_the_bases_own_grid(tmp_path: Path) -> None:
    base = {"quant": "int4", "block_size": 64, "int4_algorithm": "rtn"}
    run = RunFolder.open(train(write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), base=base)))
    plain, again = merged(run), merged(run, "requantized")
    for name in quantized_names(run):
        blocks = quantize_int4(plain[name], Int4Grid(64, "rtn"))
        assert torch.equal(again[name], dequantize_int4(blocks, plain[name].shape[1], torch.float32)), name


def test_export_says_what_it_merged_onto(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    assert main(["export", str(folder), "--onto", "original"]) == 0
    assert "WARNING: merged onto the original base" in capsys.readouterr().err
    manifest = json.loads((folder / "bundles" / "fp32" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["provenance"]["adapter"]["merged_onto"] == "original"
    assert manifest["verification"]["passed"]
    shipped = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    for name, weight in merged(RunFolder.open(folder), "original").items():
        torch.testing.assert_close(shipped[name], weight, atol=1e-6, rtol=0)


def test_an_unquantized_base_has_one_ground(trained_run: Path, tmp_path: Path) -> None:
    run = RunFolder.open(changed_copy(trained_run, tmp_path / "run", base={"quant": "none"}))
    with pytest.raises(ExportError, match="onto requantized needs a quantized base"):
        merge_onto(run, load_tuned(run), "requantized")


def test_codes_ship_under_the_model_that_was_trained(trained_run: Path) -> None:
    with pytest.raises(ExportError, match=r"nf4 ships the codes that were trained on \(got 'onto original'\)"):
        export_run(RunFolder.open(trained_run), Console(quiet=True), ["nf4"], "original")


def test_what_was_trained_on_a_rest_does_not_fit_the_whole(trained_run: Path, tmp_path: Path) -> None:
    folder = changed_copy(trained_run, tmp_path / "run")
    tree = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) | {"adapter": {"method": "pissa"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    run = RunFolder.open(folder)
    with pytest.raises(ExportError, match="pissa was trained on what it left of the base"):
        merge_onto(run, load_run_base(run), "original")
