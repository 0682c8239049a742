"""A run whose head is held as codes: it resumes to the bit, and what it was trained on is what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned_models import recipe_of
from qlora_runtime import Bundle
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_ids
from tiny_run import killed_after, train, write_recipe
from transformers import AutoModelForCausalLM

from qlora_kit.cli import main
from qlora_kit.errors import RecipeError
from qlora_kit.export.onto import merge_onto
from qlora_kit.model.load import load_base, to_reference
from qlora_kit.model.quantized_head import coded_head
from qlora_kit.model.source import find_base
from qlora_kit.train.restore import load_run_base, load_tuned
from qlora_kit.train.run_folder import RunFolder

KINDS = {"tied": (True, "nf4"), "untied": (False, "int8")}


@pytest.fixture(scope="module", params=KINDS)
def exported(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunFolder:
    """In bf16 on an nf4 base; its bundles are proven, or `main` would say so."""
    tie, head = KINDS[request.param]
    folder = tmp_path_factory.mktemp("coded")
    recipe = write_recipe(folder, save_tiny_model(folder / "model", tie=tie), base={"head_quant": head})
    run = train(recipe)
    assert main(["export", str(run), "--profiles", "fp32,int8,nf4"]) == 0
    return RunFolder(run)


def dequantized_head(run: RunFolder) -> torch.Tensor:
    head = coded_head(load_run_base(run))
    assert head is not None and head.quant == run.recipe().base.head_quant
    return head.dequantize(torch.float32)


@torch.no_grad()
def test_merged_folder_and_bundles_hold_the_dequantized_head(exported: RunFolder) -> None:
    ids, tied = tiny_ids(), exported.path.parent.parent.joinpath("model")
    logits = to_reference(load_tuned(exported))(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(exported.merged)
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.get_output_embeddings().weight, dequantized_head(exported))
    is_tied = json.loads((tied / "config.json").read_text())["tie_word_embeddings"]
    stored = load_file(exported.merged / "model.safetensors")
    assert ("lm_head.weight" in stored) != is_tied == merged.config.tie_word_embeddings
    for profile in ("fp32", "nf4"):
        found = Bundle.open(exported.bundles / profile).logits(ids.numpy())
        assert np.abs(found - logits.numpy()).max() < 1e-3, profile


def test_the_manifest_tells_of_it_and_the_adapter_does_not(exported: RunFolder) -> None:
    base = exported.manifest()["base"]
    assert base["head_quant"] == exported.recipe().base.head_quant and base["quantized_layers"] == 15
    names = load_file(exported.adapter / "adapter_model.safetensors")
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_killed_run_goes_on_to_the_same_bytes(exported: RunFolder, tmp_path: Path) -> None:
    again = killed_after(exported.path, 3, tmp_path / "tiny")
    assert main(["train", "--resume", str(again), "--quiet"]) == 0
    weights = [run / "adapter" / "adapter_model.safetensors" for run in (exported.path, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@torch.no_grad()
def test_other_grounds_have_their_own_head(exported: RunFolder) -> None:
    whole = load_base(find_base(exported.recipe().base.model)).get_output_embeddings().weight.float()
    for onto, expected in (("original", whole), ("requantized", dequantized_head(exported))):
        model = load_tuned(exported)
        merge_onto(exported, model, onto)  # type: ignore[arg-type]
        torch.testing.assert_close(model.get_output_embeddings().weight, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"new_tokens": ["<x>"]}}, "base.head_quant cannot be had with adapter.new_tokens"),
        ({"adapter": {"method": "full"}}, "base.head_quant cannot be had with adapter.method full"),
        ({"task": {"type": "classification"}}, r"base.head_quant needs task.type: causal_lm \(got classification\)"),
    ],
)
def test_a_head_that_is_trained_is_refused_in_the_recipe(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(base={"model": "m", "quant": "none", "head_quant": "int8"}, **sections)
