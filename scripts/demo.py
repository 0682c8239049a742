"""The main job from end to end on the demo data: train, export, evaluate, generate, each by its own command.

`make demo` runs it. With --record it also writes benchmarks/demo.json and demo.md: scores, time, memory, disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

RUN = Path("runs/demo")
REVIEW = "Is this movie review positive or negative?\n\nA tender, funny film that stays with you for days."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write benchmarks/demo.json and demo.md")
    record = parser.parse_args().record
    kit = [sys.executable, "-m", "qlora_kit.cli"]
    bundle = RUN / "bundles" / "int8"
    steps = {
        "train": [*kit, "train", "smollm2-sentiment", f"run.name={RUN.name}", "--overwrite"],
        "export": [*kit, "export", str(RUN)],
        "eval": [*kit, "eval", str(RUN), "--forms", "base,tuned,bundle_int8"],
        "generate": [*kit, "generate", str(bundle), "--chat", REVIEW],
    }
    costs = {name: run_step(name, command) for name, command in steps.items()}
    total = sum(cost["seconds"] for cost in costs.values())
    peak = max(cost["peak_bytes"] for cost in costs.values())
    print(f"\ndone in {total / 60:.1f} minutes, at most {peak / 2**30:.2f} GiB of memory, all processes together")
    print(f"report: {RUN / 'report.html'}\nall forms: make eval RUN={RUN}\ntalk to it: qlora-runtime chat {bundle}")
    if record:
        write_record(costs)


def run_step(name: str, command: list[str]) -> dict[str, float]:
    """Runs one command; wall seconds, and the most bytes that it and its children had resident at one time."""
    print(f"\n== {name}: {' '.join(['qlora-kit', *command[3:]])}", flush=True)
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        peak = max(peak, sum(resident_bytes(member) for member in [process, *children(process)]))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{name} failed with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def write_record(costs: dict[str, dict[str, float]]) -> None:
    from bench_runs import environment, hardware_line, write

    results: dict[str, Any] = json.loads((RUN / "eval" / "results.json").read_text(encoding="utf-8"))
    forms, pairs = results["forms"], {(pair["a"], pair["b"]): pair for pair in results["pairs"]}
    sizes = {
        path.parent.name: sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        for path in sorted(RUN.glob("bundles/*/manifest.json"))
    }
    proofs = {
        name: json.loads((RUN / "bundles" / name / "manifest.json").read_text(encoding="utf-8"))["verification"]
        for name in sizes
    }
    scores = [
        f"| {name} | {100 * form['accuracy']['value']:.1f} [{100 * form['accuracy']['low']:.1f}, "
        f"{100 * form['accuracy']['high']:.1f}] | {form['loss']['value']:.4f} |"
        for name, form in forms.items()
    ]
    gain, int8 = pairs["tuned", "base"], pairs["bundle_int8", "tuned"]
    steps = [f"| {name} | {cost['seconds']:.0f} | {cost['peak_bytes'] / 2**30:.2f} |" for name, cost in costs.items()]
    env = environment(RUN)
    table = (
        f"# The demo\n\nSmolLM2-135M-Instruct, NF4, rank 16, movie-review sentiment, {results['rows']} held-out rows; "
        "95% bootstrap intervals.\n\n| form | accuracy (%) | loss (nats a token) |\n|---|---|---|\n"
        + "\n".join(scores)
        + f"\n\nTuned beats base by {100 * gain['difference']:.1f} points [{100 * gain['low']:.1f}, "
        f"{100 * gain['high']:.1f}]; the int8 bundle answers otherwise than the tuned model on "
        f"{100 * int8['disagree']:.1f}% of rows.\n\n| step | seconds | peak GiB |\n|---|---|---|\n"
        + "\n".join(steps)
        + f"\n| all | {sum(cost['seconds'] for cost in costs.values()):.0f} | |\n\n"
        + "\n".join(
            f"- bundle {name}: {size / 2**20:.0f} MiB, largest logit difference to the trained model "
            f"{proofs[name]['distances']['max_logit']:.2g}, perplexity ratio "
            f"{proofs[name]['distances']['perplexity_ratio']:.6f}"
            for name, size in sizes.items()
        )
        + "\n\n`python scripts/demo.py --record` on "
        + hardware_line(env)
    )
    tree = {"costs": costs, "bundle_bytes": sizes, "verification": proofs, "pairs": results["pairs"], **env}
    tree["forms"] = {
        name: {key: form[key] for key in ("accuracy", "loss", "perplexity", "rows")} for name, form in forms.items()
    }
    write("demo", tree, table)


if __name__ == "__main__":
    main()
