"""A run that adapts the embedding of a tied model: trained, resumed to the bit, merged and shipped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_run import killed_after, train, write_recipe

from qlora_kit.cli import main
from qlora_kit.eval.results import read_results


def test_an_adapted_embedding_goes_all_the_way(tmp_path: Path) -> None:
    adapter = {"rank": 4, "target_modules": ["embed_tokens", "q_proj"]}
    whole = train(write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), adapter=adapter))
    killed = killed_after(whole, 3, tmp_path / "killed")
    assert main(["train", "--resume", str(killed), "--quiet"]) == 0
    weights = "adapter/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert main(["export", str(whole)]) == 0
    assert main(["eval", str(whole), "--forms", "base,tuned,merged,bundle_fp32"]) == 0
    found = {form: result.perplexity.value for form, result in read_results(whole).forms.items()}
    for form in ("merged", "bundle_fp32"):
        assert found[form] == pytest.approx(found["tuned"], rel=1e-3)
    assert not math.isclose(found["tuned"], found["base"], rel_tol=1e-3)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
