"""Runs on a tiny random model: recipes, data, and the command line in a process of its own."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.loop import train
from qlora_kit.train.progress import Progress, QuietProgress
from qlora_kit.train.run_folder import RunFolder

WORDS = "bridge stone iron river sea morning ferry coins boats bread salt lamp oil rope road water sky film".split()

TREE: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 7},
    "base": {"quant": "nf4", "compute_dtype": "fp32"},
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_seq_len": 96},
    "train": {
        "lr": 1e-2,
        "micro_batch_size": 2,
        "grad_accum_steps": 2,
        "max_steps": 6,
        "warmup_steps": 1,
        "eval_every": 3,
        "eval_batches": 2,
        "save_every": 2,
        "gradient_checkpointing": False,
        "threads": 1,
    },
    "eval": {"batch_size": 4, "samples": 0},
}


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Questions and answers of very different lengths."""
    lines = []
    for k in range(rows):
        words = [WORDS[(seed + k * 7 + i * (k + 3)) % len(WORDS)] for i in range(2 + (k * k) % 11)]
        answer = " ".join(words[: 1 + k % 5])
        lines.append(json.dumps({"prompt": f"{k}: {' '.join(words)}?", "completion": answer}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_tree(folder: Path, model: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain data, its run folder and data below `folder`. `changes` go into the sections."""
    tree = copy.deepcopy(TREE)
    tree["run"]["out_dir"] = str(folder / "runs")
    tree["base"]["model"] = str(model)
    for name, rows, seed in (("train", 30, 0), ("eval", 9, 5)):
        path = folder / f"{name}.jsonl"
        tree["data"][name] = str(path if path.exists() else write_rows(path, rows, seed))
    for section, fields in changes.items():
        tree.setdefault(section, {}).update(fields)
    return tree


def tiny_recipe(folder: Path, model: Path, **changes: dict[str, Any]) -> Recipe:
    return parse_recipe(tiny_tree(folder, model, **changes))


def train_here(recipe: Recipe, overwrite: bool = False, progress: Progress | None = None) -> RunFolder:
    """Trains in this process."""
    run = RunFolder.create(recipe, overwrite)
    train(recipe, run, progress or QuietProgress(), overwrite=overwrite)
    return run


def resume_here(run: RunFolder, recipe: Recipe | None = None, progress: Progress | None = None) -> None:
    train(recipe or run.recipe(), run, progress or QuietProgress(), resume=True)


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start_cli(*arguments: Any, prefix: list[str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """`qlora-kit ARGUMENTS` in a process of its own, in a process group of its own."""
    command = [*(prefix or [sys.executable]), "-m", "qlora_kit.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run_cli(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    process = start_cli(*arguments, **options)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def adapter_sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
