"""Merge and export of a 7B or 8B shape on a CPU: the most memory and disk that they take, and what was said beforehand.

    python scripts/bench_export_7b.py --shape llama-3.1-8b [--work FOLDER] [--zeros-from 1] [--threads 2]

Writes the shape's checkpoint, trains one step on it, and runs `qlora-kit export` in a process of its own: `int8` from
an NF4 base, `int4_exact` from an int4 base (rounded to the nearest). Memory is anonymous memory of that process and
of those that it starts; disk is what the run's folder grows by. With --zeros-from layers are zeros that take no disk
in the checkpoint; the merged model and the bundles are whole. Linux only. Writes benchmarks/export_7b.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench_7b import GIB, write_tokenizer
from bench_runs import RESULTS, hardware_line, this_machine, train_run, write
from make_shapes import shapes, write_shape

from qlora_kit.train.memory_limit import anonymous_bytes

MEMORY_GIB = 16.0  # bar
PROFILES = {"int8": {"quant": "nf4"}, "int4_exact": {"quant": "int4", "int4_algorithm": "rtn"}}
POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(shapes()), default="llama-3.1-8b")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--layers", type=int, help="only so many layers, for a trial")
    parser.add_argument("--zeros-from", type=int, help="layers from this one on are zeros")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_export_7b"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, and use one that is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    base = options.work / options.shape
    if not (options.keep and (base / "model.safetensors.index.json").is_file()):
        config = shapes()[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
        write_shape(config, base, zeros_from=options.zeros_from)
        write_tokenizer(base)
    found: dict[str, Any] = {}
    for profile in options.profiles:
        found[profile] = _measure(options, base, profile)
        _report(options, found)
    if not options.keep:
        shutil.rmtree(base)


def _measure(options: argparse.Namespace, base: Path, profile: str) -> dict[str, Any]:
    run = train_run(str(_recipe(options, base, profile)), profile, options.work, [])
    before, began = _tree_bytes(run), time.perf_counter()
    log = options.work / f"{profile}.log"
    with log.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", "qlora_kit.cli", "export", str(run), "--profiles", profile]
        process = psutil.Popen(command, stderr=said)
        memory = disk = 0
        while process.poll() is None:
            memory, disk = max(memory, _anonymous_bytes(process)), max(disk, _tree_bytes(run) - before)
            time.sleep(POLL_S)
    words = " ".join(log.read_text(encoding="utf-8").split())
    if process.returncode:
        raise SystemExit(f"export ended with {process.returncode}: {words[-500:]}")
    stated = re.search(r"takes up to ([\d.]+) GiB", words)
    bundle = _tree_bytes(run / "bundles" / profile)
    shutil.rmtree(run)
    return {
        "memory_gib": memory / GIB,
        "disk_gib": disk / GIB,
        "stated_disk_gib": float(stated[1]) if stated else None,
        "bundle_gib": bundle / GIB,
        "minutes": (time.perf_counter() - began) / 60,
    }


def _recipe(options: argparse.Namespace, base: Path, profile: str) -> Path:
    rows = options.work / "rows.jsonl"
    lines = [
        {"prompt": f"Of {place} and {place} what is left?", "completion": f" {place * 7 % 26}"} for place in range(8)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tree = {
        "run": {"name": profile},
        "base": {"model": str(base), **PROFILES[profile]},
        "adapter": {"rank": 16, "target_modules": "all-linear"},
        "data": {"train": str(rows), "eval": str(rows), "max_seq_len": 48},
        "train": {"micro_batch_size": 1, "max_steps": 1, "threads": options.threads, "gradient_checkpointing": True},
        "eval": {"samples": 0},
        "export": {"verify_prompts": 2},
    }
    file: Path = options.work / f"{profile}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def _anonymous_bytes(process: psutil.Process) -> int:
    """Of the process and of those that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
        for one in [process, *process.children(recursive=True)]:
            total += anonymous_bytes(one)
    return total


def _tree_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
            total += 512 * file.lstat().st_blocks
    return total


def _report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    lines = [
        f"| {profile} | {of['memory_gib']:.1f} ({'held' if of['memory_gib'] <= MEMORY_GIB else 'NOT held'}) "
        f"| {of['stated_disk_gib']} | {of['disk_gib']:.1f} | {of['bundle_gib']:.1f} | {of['minutes']:.0f} |"
        for profile, of in found.items()
    ]
    part = f" **A trial with {options.layers} layers.**" if options.layers else ""
    zeros = options.zeros_from
    part += f" Layers from {zeros} on are zeros in the checkpoint." if zeros is not None else ""
    environment = this_machine()
    table = (
        f"# Export of {options.shape}'s exact shape on a CPU\n\n"
        "Random weights, LoRA of rank 16 on all linears, proof on 2 rows with 64 greedy tokens each. Memory is "
        f"anonymous memory, all processes and their imports included.{part}\n\n"
        f"| profile | most memory, GiB (bar: {MEMORY_GIB:.0f}) | disk said beforehand, GiB | most disk used, GiB "
        "| bundle, GiB | minutes |\n|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n\n"
        f"`python scripts/bench_export_7b.py --shape {options.shape}"
        + (f" --zeros-from {zeros}" if zeros is not None else "")
        + f" --threads {options.threads}` on "
        + hardware_line(environment)
    )
    about = {"shape": options.shape, "layers": options.layers, "zeros_from": zeros, **environment}
    write("export_7b", {"profiles": found, **about}, table, options.out)


if __name__ == "__main__":
    main()
