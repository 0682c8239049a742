"""Every method on every kind of base, through the command line: train, resume to the bit, score, ship or refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny_model, tiny_ids
from tiny_run import killed_after, label_rows, write_rows

from qlora_kit.adapters.methods import METHODS
from qlora_kit.cli import main
from qlora_kit.eval.results import read_results
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

QUANTS = ("nf4", "int8", "int4", "none")
FIELDS: dict[str, dict[str, Any]] = {  # beside the defaults; a method that needs nothing has no entry
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "loftq": {"rank": 4},
    "adalora": {"rank": 2, "warmup_share": 0.2, "final_share": 0.2, "prune_every": 1},  # killed before ranks are fixed
    "sora": {"rank": 4, "sparse_lambda": 5.0},
    "prompt_tuning": {"tokens": 4},
    "qa_lora": {"rank": 4, "group_size": 64},
}
NOT_ON: dict[tuple[str, str], str] = {
    ("loftq", "none"): "base.quant none loses nothing",
    **{("qa_lora", quant): "qa_lora needs base.quant: int4" for quant in QUANTS if quant != "int4"},
    ("full", "nf4"): "codes cannot be trained",
    ("full", "int4"): "codes cannot be trained",
    ("full", "int8"): "codes cannot be trained",
}
"""(method, quant) to words of the refusal."""


MERGES = ("lora-nf4", "dora-nf4", "pissa-nf4", "adalora-nf4", "bottleneck-nf4", "prompt_tuning-nf4", "qa_lora-int4")
"""One for each way to merge or to be refused; the others, as quick to write but not to run, are slow."""


def write_recipe(folder: Path, method: str, quant: str) -> Path:
    tree = {
        "run": {"name": "whole", "out_dir": str(folder / "runs")},
        "base": {"model": str(save_tiny_model(folder / "model", "qwen2")), "quant": quant},
        "adapter": {"method": method, **FIELDS.get(method, {})},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", label_rows(24))),
            "eval": str(write_rows(folder / "eval.jsonl", label_rows(60)[48:])),
            "max_seq_len": 96,
        },
        "train": {"optimizer": "adamw", "lr": 0.01, "max_steps": 5, "save_every": 1, "keep_checkpoints": 5,
                  "micro_batch_size": 4, "threads": 1},
        "eval": {"answer": "choices", "choices": ["good", "bad"], "max_new_tokens": 6, "samples": 0},
        "export": {"profiles": ["fp32"], "verify_prompts": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "recipe.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits.float()


def trained(folder: Path, method: str, quant: str) -> Path:
    assert main(["train", str(write_recipe(folder, method, quant)), "--quiet"]) == 0
    return folder / "runs" / "whole"


def pairs(*fast: str) -> list[Any]:
    """Every (method, quant); slow but where `fast` names the quant, or METHOD-QUANT."""
    return [
        pytest.param(method, quant, marks=[] if {quant, f"{method}-{quant}"} & {*fast} else pytest.mark.slow)
        for method in METHODS
        for quant in QUANTS
    ]


@pytest.mark.parametrize(("method", "quant"), pairs("nf4", "none", "lora-int8", "lora-int4", "qa_lora-int4"))
def test_trained_resumed_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, quant: str
) -> None:
    if (method, quant) in NOT_ON:
        assert main(["train", str(write_recipe(tmp_path, method, quant)), "--quiet"]) == 2
        assert NOT_ON[method, quant] in capsys.readouterr().err
        return
    whole = trained(tmp_path, method, quant)

    killed = killed_after(whole, 3, tmp_path / "runs" / "killed")
    assert main(["train", "--resume", str(killed), "--quiet"]) == 0
    assert files(killed / "adapter") == files(whole / "adapter")

    assert torch.isfinite(logits(load_tuned(RunFolder.open(whole)))).all()
    assert main(["eval", str(whole), "--forms", "base,tuned"]) == 0
    results = read_results(whole).forms
    assert results["tuned"].perplexity.value < results["base"].perplexity.value


@pytest.mark.parametrize(("method", "quant"), pairs(*MERGES))
def test_merged_and_exported_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, quant: str
) -> None:
    if (method, quant) in NOT_ON:
        pytest.skip(NOT_ON[method, quant])
    whole = trained(tmp_path, method, quant)
    reason = METHODS[method].cannot_merge
    assert main(["export", str(whole)]) == (2 if reason else 0)
    if reason:
        run = RunFolder.open(whole)
        assert reason in capsys.readouterr().err
        assert not run.merged.exists() and not run.bundles.exists()
        return
    assert main(["eval", str(whole), "--forms", "tuned,merged,bundle_fp32"]) == 0
    results = read_results(whole).forms
    for form in ("merged", "bundle_fp32"):
        assert results[form].perplexity.value == pytest.approx(results["tuned"].perplexity.value, rel=1e-3)
