"""Runs on a tiny random model: recipes, data, and the command line in a process of its own."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.loop import train
from qlora_kit.train.progress import Progress, QuietProgress
from qlora_kit.train.run_folder import RunFolder

WORDS = ["bridge", "stone", "iron", "river", "sea", "ferry", "coins", "boats", "bread", "salt", "lamp", "oil", "rope"]

TREE: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 7},
    "base": {"quant": "nf4", "compute_dtype": "fp32"},
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_seq_len": 120},
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

# With `write_gibberish`: the loss on the held-out rows is lowest at step 4 and rises from there.
RISING = {"lr": 0.2, "schedule": "constant", "max_steps": 8, "eval_every": 2}


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Questions and answers of very different lengths."""
    lines = []
    for k in range(rows):
        words = [WORDS[(seed + k * 7 + i * (k + 3)) % len(WORDS)] for i in range(9)]
        answer = " ".join(words[: 1 + (k % 3) ** 3])
        lines.append(json.dumps({"prompt": f"{k}: {' '.join(words[: 1 + k % 5])}?", "completion": answer}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_gibberish(path: Path, rows: int = 9) -> Path:
    """Held-out answers that training on `write_rows` makes less and less likely."""
    lines = [json.dumps({"prompt": f"{k}: stone?", "completion": "%$#@ ^&*( }{|<"[k % 3 :]}) for k in range(rows)]
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
    train(recipe, run, progress or QuietProgress())
    return run


def resume_here(run: RunFolder, recipe: Recipe | None = None, progress: Progress | None = None) -> None:
    train(recipe or run.recipe(), run, progress or QuietProgress(), resume=True)


def write_recipe(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / f"{tree['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def unfinish(run: RunFolder) -> None:
    """As if the run had been killed while it wrote its adapter."""
    shutil.rmtree(run.adapter)
    run.update_manifest(status="running")


def adapter_sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


# A server that has imported everything and forks a child for each run: a process of its own in half a second.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "qlora_kit.train.loop",
        "qlora_kit.report",
        "transformers.generation",
        "transformers.models.llama.modeling_llama",
        "torch.utils.tensorboard",
    ]
)


class ForkedCli:
    """`qlora-kit ARGUMENTS` in a process of its own; its output goes to files in `folder`."""

    def __init__(
        self,
        folder: Path,
        *arguments: Any,
        die_at: int | None = None,
        file_limit_bytes: int = 0,
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out_file, self.err_file = folder / "stdout.txt", folder / "stderr.txt"
        words = [str(argument) for argument in arguments]
        self.process = _SERVER.Process(
            target=_cli_child, args=(words, self.out_file, self.err_file, die_at, file_limit_bytes, env or {})
        )
        self.process.start()
        self.pid: int = self.process.pid or 0

    def wait(self, timeout_s: float = 120.0) -> int:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running: {self.err}")
        return self.process.exitcode

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def out(self) -> str:
        return self.out_file.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self.err_file.read_text(encoding="utf-8")


def _cli_child(
    words: list[str], out_file: Path, err_file: Path, die_at: int | None, file_limit_bytes: int, env: dict[str, str]
) -> None:
    for descriptor, path in ((1, out_file), (2, err_file)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a forked server's children ignore it
    os.environ.update(env)
    if die_at is not None:
        _die_at_file_event(die_at)
    if file_limit_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, resource.RLIM_INFINITY))
    from qlora_kit.cli import main

    status = main(words)
    if file_limit_bytes:  # coverage's own file, written at the exit, may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.exit(status)


def _die_at_file_event(number: int) -> None:
    """SIGKILL at the `number`-th time that this process opens, makes, renames or removes something in a run folder."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        if f"{os.sep}runs{os.sep}" in str(arguments[0]) and not str(arguments[0]).endswith(".lock"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
