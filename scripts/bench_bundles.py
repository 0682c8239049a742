"""Do bundles of the tasks say what the trained model says? Their fp32 and int8 bundles on hundreds of held-out rows.

    python scripts/bench_bundles.py [TASK ...] [--rows 500]

Each task's short run (task_runs.py) is exported with that many rows of proof, and judged by what its bundles' manifests
say: the largest distance of a logit, and the share of labels, tags, answers or tokens of a translation that are the
same. In a folder with the recipes' demo/ and data/. Writes benchmarks/bundles.json and .md; tasks that are not named
stay as they are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from bench_runs import RESULTS, hardware_line, this_machine, write
from task_runs import TASKS, train_task

PROFILES = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--rows", type=int, default=500, help="held-out rows of each")
    parser.add_argument("--steps", type=int, default=300, help="of each run, 16 rows a step")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_bundles"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    file = options.out / "bundles.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    asked = {"rows": options.rows, "steps": options.steps}
    found = known.get("runs", {}) if {name: known.get(name) for name in asked} == asked else {}
    for name in options.tasks or TASKS:
        found[name] = _export(train_task(name, options.runs, options.steps), options.rows)
        _report(found, options)  # each time: what is done stays done


def _export(run: Path, rows: int) -> dict[str, dict[str, Any]]:
    """Profile to what its manifest says; a bundle that was refused is read too."""
    with tempfile.TemporaryDirectory(prefix="bundles-") as scratch:
        copy = Path(scratch) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "bundles", "merged"))
        recipe = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
        recipe["export"] |= {"verify_prompts": rows, "onto": "dequantized"}
        (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "qlora_kit.cli", "export", str(copy), "--profiles", ",".join(PROFILES)]
        subprocess.run(command, check=False)  # a bundle past its tolerance is a result, too
        return {profile: _read(next(copy.glob(f"bundles/{profile}*/manifest.json"))) for profile in PROFILES}


def _read(manifest: Path) -> dict[str, Any]:
    tree = json.loads(manifest.read_text(encoding="utf-8"))
    size = sum(file["bytes"] for file in tree["files"].values())
    return {"task": tree["task"]["type"], "bytes": size, **tree["verification"]}


def _distances(found: dict[str, Any]) -> tuple[float, str]:
    """The largest difference of a logit, and what is the same; of a number nothing is decided."""
    if "max_logit" in found:  # a translation: each token of its targets
        return found["max_logit"], f"{found['positions']} tokens ({found['top1_agreement']:.2%})"
    equal, of = found["decisions_equal"], found["decisions"]
    return found["max_logit_difference"], f"{equal} of {of} ({equal / of:.2%})" if of else ""


def _report(found: dict[str, dict[str, dict[str, Any]]], options: argparse.Namespace) -> None:
    rows, steps = options.rows, options.steps
    lines = []
    for run, profiles in found.items():
        for profile, of in profiles.items():
            largest, share = _distances(of["distances"])
            lines.append(
                f"| {run} | {of['task']} | {profile} | {of['bytes'] / 2**20:.0f} | {of['distances']['rows']} "
                f"| {largest:.2g} | {share} | {'yes' if of['passed'] else 'no'} |"
            )
    environment = this_machine()
    table = (
        "# Bundles of the tasks against the models that were trained\n\n"
        f"On {rows} held-out rows: the largest difference of a logit, and labels, tags of words, answers of windows or "
        "tokens of translations that are the same.\n\n"
        "| run | task | profile | MiB | rows | largest difference | same decisions | passed |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n\n"
        "NF4 and LoRA on MiniLM, "
        f"{steps} steps; entities and answers by their shipped recipes to the end. The translation's T5 is small, "
        "of random weights, and trained whole.\n\n"
        f"`python scripts/bench_bundles.py` on {hardware_line(environment)}"
    )
    write("bundles", {"rows": rows, "steps": steps, "runs": found, **environment}, table, options.out)


if __name__ == "__main__":
    main()
