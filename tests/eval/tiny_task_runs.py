"""Runs of tasks on a tiny random BERT that the tests of `eval` and `predict` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import save_tiny_encoder, task_recipe, trained, write_jsonl
from tiny_run import made_once

from qlora_kit.train.run_folder import RunFolder

TEXT = "the bridge was built of stone and iron in lisbon anna sold seven boats by the sea where did it"
WORDS = TEXT.split()


def sentence(k: int) -> str:
    """One of many, of different lengths."""
    return " ".join(WORDS[(k * 5 + i * (k % 4 + 1)) % len(WORDS)] for i in range(2 + k % 7))


def label_rows(count: int) -> list[dict[str, Any]]:
    """Texts with one of three labels, which their first word gives away."""
    firsts, labels = ("boats", "stone", "sea"), ("buy", "sell", "wait")
    return [{"text": f"{firsts[k % 3]} {sentence(k)}", "label": labels[k % 3]} for k in range(count)]


def train_task(
    folder: Path, model: Path, task: dict[str, Any], train_rows: list[Any], eval_rows: list[Any], **sections: Any
) -> RunFolder:
    """A finished run below `folder`, on a base that is not quantized unless `sections` say so."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_jsonl(folder / "rows.jsonl", train_rows)),
        "eval": str(write_jsonl(folder / "held-out.jsonl", eval_rows)),
    }
    changes = {
        "base": {"quant": "none"} | sections.pop("base", {}),
        "data": data | sections.pop("data", {}),
        "train": {"max_steps": 3, "lr": 0.02} | sections.pop("train", {}),
        "eval": {"samples": 0, "batch_size": 4} | sections.pop("eval", {}),
    }
    return trained(task_recipe(folder, model, task, **changes, **sections))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "tiny-bert", save_tiny_encoder)


@pytest.fixture(scope="session")
def label_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> RunFolder:
    """Classifies; only to be read."""

    def make(folder: Path) -> Path:
        steps = {"max_steps": 20, "lr": 0.01}
        rows = label_rows(24), label_rows(60)[30:51]
        return train_task(folder, tiny_bert, {"type": "classification"}, *rows, train=steps).path

    return RunFolder(made_once(tmp_path_factory, "label-run", make))
