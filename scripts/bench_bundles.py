"""Do bundles of the tasks say what the trained model says? Their fp32 and int8 bundles on hundreds of held-out rows.

    python scripts/bench_bundles.py RUN RUN ... [--rows 500]

Each run is copied, exported with that many rows of proof, and judged by what its bundles' manifests say: the largest
distance of a logit, and the share of labels, tags or answers that are the same. Writes benchmarks/bundles.json and .md.
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

PROFILES = ("fp32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of tasks that do not generate")
    parser.add_argument("--rows", type=int, default=500, help="held-out rows of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    found = {}
    for run in options.runs:
        found[run.name] = _export(run, options.rows)
        _report(found, options.rows, options.out)  # each time: what is done stays done


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


def _report(found: dict[str, dict[str, dict[str, Any]]], rows: int, out: Path) -> None:
    lines = []
    for run, profiles in found.items():
        for profile, of in profiles.items():
            far = of["distances"]
            share = f"{far['decisions_equal']} of {far['decisions']}"
            share += f" ({far['decisions_equal'] / far['decisions']:.2%})" if far["decisions"] else ""
            lines.append(
                f"| {run} | {of['task']} | {profile} | {of['bytes'] / 2**20:.0f} | {far['rows']} "
                f"| {far['max_logit_difference']:.2g} | {share} | {'yes' if of['passed'] else 'no'} |"
            )
    environment = this_machine()
    table = (
        "# Bundles of the tasks against the models that were trained\n\n"
        f"On {rows} held-out rows: the largest difference of a logit, and labels, tags of words or answers of windows "
        "that are the same.\n\n"
        "| run | task | profile | MiB | rows | largest difference | same decisions | passed |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n\n"
        f"`python scripts/bench_bundles.py RUN ... --rows {rows}` on {hardware_line(environment)}"
    )
    write("bundles", {"rows": rows, "runs": found, **environment}, table, out)


if __name__ == "__main__":
    main()
