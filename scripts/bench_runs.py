"""What the training benchmarks share: one run through the command line, and where figures are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks"


def train_run(recipe: str, name: str, out_dir: Path, overrides: list[str]) -> Path:
    """Trains `recipe` as OUT_DIR/NAME unless that run is finished already, going on where it was stopped."""
    run = out_dir / name
    if _status(run) == "finished":
        return run
    command = [sys.executable, "-m", "qlora_kit.cli", "train", "--quiet"]
    if _status(run):
        command += ["--resume", str(run)]
    else:
        command += [recipe, f"run.name={name}", f"run.out_dir={out_dir}", *overrides, "--overwrite"]
    subprocess.run(command, check=True)
    return run


def merged(run: Path) -> Path:
    """The folder of a finished run's merged model, made where it is not there yet."""
    from qlora_kit.export.merge import save_merged
    from qlora_kit.export.onto import merge_onto
    from qlora_kit.model.load import to_reference
    from qlora_kit.train.restore import load_run_tokenizer, load_tuned
    from qlora_kit.train.run_folder import RunFolder

    folder = RunFolder.open(run)
    if not folder.merged.exists():
        model = to_reference(load_tuned(folder))
        save_merged(model, load_run_tokenizer(folder), folder.merged, lambda hold: merge_onto(folder, model, hold=hold))
    return folder.merged


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of RUN/metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == kind]


def environment(run: Path) -> dict[str, Any]:
    """Hardware, versions and commit that a run was made with; the commit is the one that is checked out now."""
    made = manifest(run)
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], check=False, cwd=here, capture_output=True, text=True)
    return {"machine": made["machine"], "tools": made["tools"], "commit": found.stdout.strip() or None}


def this_machine() -> dict[str, Any]:
    """Hardware and versions, where no run folder tells them."""
    import torch

    from qlora_kit.train.records import tool_versions

    machine = {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {"machine": machine, "tools": tool_versions()}


def write(name: str, tree: dict[str, Any], table: str, folder: Path = RESULTS) -> None:
    """Writes FOLDER/NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)


def hardware_line(environment: dict[str, Any]) -> str:
    """One line under a table: processor, threads and versions."""
    machine, tools = environment["machine"], environment["tools"]
    versions = ", ".join(f"{name} {tools[name]}" for name in ("torch", "transformers", "bitsandbytes"))
    return f"{machine['device']} ({machine['cpu_capability']}), {machine['threads']} threads; {versions}.\n"


def _status(run: Path) -> str | None:
    return manifest(run).get("status") if (run / "manifest.json").exists() else None


def against(losses: dict[str, list[float]], name: str, reference: str, digits: int = 4) -> str:
    """`name`'s losses less those of `reference`, with a paired 95% t interval; empty without one."""
    from qlora_kit.eval.intervals import paired_t_interval

    if name == reference or reference not in losses or len(losses[name]) < 2:
        return ""
    found = paired_t_interval(losses[name], losses[reference])
    return f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
