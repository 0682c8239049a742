"""One tiny run, trained and exported once for all tests that look at runs, and copies of it to break."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from tiny_models import save_tiny_model

from qlora_kit.cli import main
from qlora_kit.train.run_folder import RunFolder

QUESTIONS = ("a film by the sea", "seven boats", "the ferryman", "bread and salt", "an iron bridge", "lamp oil")


def label_rows(count: int) -> list[dict[str, str]]:
    """Prompts of different lengths, completed by good or bad."""
    return [
        {"prompt": f"{QUESTIONS[k % 6]} {k}?" + " why" * (k % 5), "completion": ("good", "bad")[k % 6 < 3]}
        for k in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """FOLDER/recipe.yaml with rows beside it: a run of 6 steps below FOLDER/runs. `sections` change fields."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_rows(folder / "train.jsonl", label_rows(24))
    held_out = write_rows(folder / "eval.jsonl", label_rows(60)[48:])
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "out_dir": str(folder / "runs")},
        "base": {"model": str(model)},
        "adapter": {"rank": 4},
        "data": {"train": str(train), "eval": str(held_out), "max_seq_len": 96},
        "train": {
            "optimizer": "adamw",
            "lr": 0.02,
            "max_steps": 6,
            "save_every": 3,
            "micro_batch_size": 4,
            "threads": 1,
        },
        "eval": {"answer": "choices", "choices": ["good", "bad"], "max_new_tokens": 6, "samples": 1},
        "export": {"profiles": ["fp32"], "verify_prompts": 4},
    }
    for section, fields in sections.items():
        tree.setdefault(section, {}).update(fields)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def train(recipe: Path, *overrides: str) -> Path:
    """Trains a recipe of `write_recipe`; returns the run folder."""
    assert main(["train", str(recipe), *overrides, "--quiet"]) == 0
    return recipe.parent / "runs" / "tiny"


def changed_copy(run: Path, target: Path, **sections: dict[str, Any]) -> Path:
    """A copy of a run with another recipe."""
    shutil.copytree(run, target)
    tree = yaml.safe_load((target / "recipe.yaml").read_text(encoding="utf-8"))
    for section, fields in sections.items():
        tree[section].update(fields)
    (target / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return target


def killed_after(run: Path, step: int, target: Path) -> Path:
    """A copy of a run as a kill after `step` would have left it."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "adapter")
    for folder in target.glob("checkpoints/step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    RunFolder.open(target).update_manifest(status="running", step=step, checkpoint=step)
    return target


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make(folder)` returns; made by the first test process that asks for it, and shared by all."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, note = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not note.exists():
            note.write_text(str(make(folder)), encoding="utf-8")
    return Path(note.read_text(encoding="utf-8"))


def make_trained(folder: Path) -> Path:
    """A Llama with a tied head, nf4 base in bf16."""
    return train(write_recipe(folder, save_tiny_model(folder / "model")))


def make_exported(folder: Path, trained: Path) -> Path:
    """A copy of the trained run, with its merged folder and its fp32 bundle."""
    shutil.copytree(trained, folder)
    assert main(["export", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder; only to be read."""
    return made_once(tmp_path_factory, "tiny-trained", make_trained)


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """The same with merged/ and bundles/fp32; only to be read."""
    return made_once(tmp_path_factory, "tiny-exported", lambda folder: make_exported(folder, trained_run))
