"""Does a run that is killed and resumed end in the same bytes as one that never was?

    python scripts/check_resume.py [RECIPE] [section.key=value ...] [--kills 10] [--seed 0]

Trains the recipe once without interruption and once with SIGKILLs: at random moments, in the middle of evaluations
and in the middle of writing checkpoints, each followed by a resume. Exits with 1 where the adapters differ.
Writes benchmarks/resume_identity.json and .md, or with --out into another folder.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_runs
from bench_runs import environment, hardware_line, manifest, metrics, write

from qlora_kit.train.run_folder import RunFolder

KINDS = ("step", "checkpoint", "evaluation", "step", "checkpoint")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="smollm2-sentiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/check_resume"))
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks)")
    options = parser.parse_args()
    if "=" in options.recipe:
        options.recipe, options.overrides = parser.get_default("recipe"), [options.recipe, *options.overrides]
    bench_runs.RESULTS = options.out or bench_runs.RESULTS
    whole, killed = options.runs / "whole", options.runs / "killed"
    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
    if train_process(first_arguments(options, whole)).wait() != 0:
        raise SystemExit("the run without kills failed")
    kills = train_with_kills(options, killed, manifest(whole)["total_steps"])
    digests = {run.name: adapter_sha256(run) for run in (whole, killed)}
    curves = [[(r["step"], r["loss"]) for r in metrics(run, "train")] for run in (whole, killed)]
    same = digests["whole"] == digests["killed"] and curves[0] == curves[1]
    report(options, kills, digests, same, environment(whole))
    return 0 if same else 1


def train_with_kills(options: argparse.Namespace, run: Path, total_steps: int) -> list[dict[str, Any]]:
    """Trains RUN, killing it `options.kills` times on the way, and once more to its end."""
    choose = random.Random(options.seed)
    start = first_arguments(options, run)
    steps = sorted(choose.randrange(1, total_steps) for _ in range(options.kills))
    kills: list[dict[str, Any]] = []
    for number, step in enumerate(steps):
        kind, share = KINDS[number % len(KINDS)], choose.random()
        process = train_process(start)
        hit = kill_at(process, RunFolder(run), kind, step, share)
        if hit is None:
            break  # it ended before the moment came
        left = sorted(path.name for path in (run / "checkpoints").glob(".partial-step-*"))
        kills.append({"kind": kind, "wanted_step": step, "last_step": hit, "left_half_written": left})
        print(f"kill {number + 1}: {kind}, after step {hit} was logged", flush=True)
        if (run / "recipe.yaml").exists():
            start = ["--resume", str(run)]
    if train_process(start).wait() != 0:
        raise SystemExit("the last resume failed")
    return kills


def first_arguments(options: argparse.Namespace, run: Path) -> list[str]:
    return [options.recipe, f"run.name={run.name}", f"run.out_dir={run.parent}", *options.overrides]


def train_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "qlora_kit.cli", "train", "--quiet", *arguments])


def kill_at(process: subprocess.Popen[bytes], run: RunFolder, kind: str, step: int, share: float) -> int | None:
    """SIGKILL once `step` is reached again and the moment of its kind has come. Returns the last step logged."""
    before = traces(run)
    while process.poll() is None:
        now = traces(run)
        begun = now["metrics"] != before["metrics"]  # it has gone on, and forgotten what came after its checkpoint
        done, seconds, in_evaluation = progress(run) if begun else (0, 0.0, False)
        writing = now["half written"] not in (None, before["half written"])
        if done >= step and {"step": True, "checkpoint": writing, "evaluation": in_evaluation}[kind]:
            time.sleep(0.0 if writing else share * seconds)
            process.kill()
            process.wait()
            return progress(run)[0]
        time.sleep(0.0005)
    if process.returncode:
        raise SystemExit(f"training failed with exit code {process.returncode}")
    return None


def traces(run: RunFolder) -> dict[str, Any]:
    """Marks that tell a file or folder from another of the same name."""
    found = {"metrics": run.metrics_file, "half written": next(run.checkpoints.glob(".partial-step-*/adapter"), None)}
    marks: dict[str, Any] = {}
    for name, path in found.items():
        try:
            marks[name] = None if path is None else (str(path), path.stat().st_ino, path.stat().st_mtime_ns)
        except FileNotFoundError:  # renamed in between
            marks[name] = None
    return marks


def progress(run: RunFolder) -> tuple[int, float, bool]:
    """(last step logged, seconds it took, whether an evaluation is under way)."""
    try:
        records = run.metrics()
    except FileNotFoundError:
        records = []
    if not records or records[-1]["kind"] != "train":
        return (records[-1]["step"] if records else 0), 0.0, False
    last, every = records[-1], run.recipe().train.eval_every
    return last["step"], last["tokens"] / last["tokens_per_s"], bool(every) and last["step"] % every == 0


def adapter_sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def report(options: argparse.Namespace, kills: list[Any], digests: dict[str, str], same: bool, env: Any) -> None:
    rows = [
        f"| {k + 1} | {kill['kind']} | {kill['last_step']} | {', '.join(kill['left_half_written']) or '–'} |"
        for k, kill in enumerate(kills)
    ]
    table = (
        "# Killed and resumed: the same bytes?\n\n"
        f"{options.recipe}, {' '.join(options.overrides) or 'as shipped'}; {len(kills)} SIGKILLs, seed {options.seed}. "
        f"Adapters and loss curves are **{'identical' if same else 'DIFFERENT'}**.\n\n"
        f"    never killed  {digests['whole']}\n    killed        {digests['killed']}\n\n"
        "| kill | in | last step logged | left half written |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n`python scripts/check_resume.py {' '.join([options.recipe, *options.overrides])}` on "
        + hardware_line(env)
    )
    tree = {"recipe": options.recipe, "overrides": options.overrides, "seed": options.seed, "kills": kills}
    write("resume_identity", {**tree, "adapter_sha256": digests, "identical": same, **env}, table)


if __name__ == "__main__":
    sys.exit(main())
