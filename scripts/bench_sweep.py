"""What do rank and alpha do? LoRA on an NF4 encoder over a grid of both, the same learning rate, rows and steps.

    python scripts/bench_sweep.py --model PATH/minilm --data PATH [--task addresses] [--seeds 0 1]

PATH is bench_encoders' folder of datasets. The update is scaled by alpha / rank: a row of the grid shares this scale.
Writes benchmarks/sweep.json, .md and .png; runs that are finished are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bench_encoders import BENCHES, prepare, score, tuned_run
from bench_runs import RESULTS, environment, hardware_line, manifest, write

RANKS = (1, 2, 4, 8, 16, 32, 64)
SCALES = (0.5, 2.0, 8.0)  # alpha / rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--task", choices=BENCHES, default="addresses")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of one run (default 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_sweep"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    prepare(options, [options.task])
    cells, run = [], options.runs
    for rank in RANKS:
        for scale in SCALES:
            scores = []
            for seed in options.seeds:
                adapter = {"method": "lora", "rank": rank, "alpha": scale * rank}
                run = tuned_run(
                    options, options.task, f"r{rank}x{scale:g}", adapter, BENCHES[options.task].lora_lr, seed
                )
                scores.append(score(run, options.task))
            trained = manifest(run)["results"]["trainable_params"]
            cells.append({"rank": rank, "scale": scale, "scores": scores, "trainable_params": trained})
    _report(options, cells, environment(run))


def _report(options: argparse.Namespace, cells: list[dict[str, Any]], env: dict[str, Any]) -> None:
    bench, seeds = BENCHES[options.task], ", ".join(map(str, options.seeds))
    rows = []
    for rank in RANKS:
        of = [cell for cell in cells if cell["rank"] == rank]
        values = " | ".join(
            f"{np.mean(cell['scores']):.3f} ({min(cell['scores']):.3f} to {max(cell['scores']):.3f})" for cell in of
        )
        rows.append(f"| {rank} | {of[0]['trainable_params']:,} | {values} |")
    table = (
        f"# Rank and alpha\n\nMiniLM on NF4, LoRA on all linear layers, {options.task}: {bench.score} of held-out rows "
        f"after {bench.steps} steps at lr {bench.lora_lr:g},\nmean and range over seeds {seeds}. Columns: alpha / "
        "rank, by which the update is scaled. Heads are trained in full and count as\ntrained weights.\n\n"
        f"| rank | trained weights | {' | '.join(f'{scale:g}' for scale in SCALES)} |\n"
        f"|{'---|' * (2 + len(SCALES))}\n" + "\n".join(rows) + "\n\n"
        f"`python scripts/bench_sweep.py --model PATH/minilm --data PATH --task {options.task}` on {hardware_line(env)}"
    )
    tree = {"task": options.task, "seeds": options.seeds, "steps": bench.steps, "lr": bench.lora_lr, "cells": cells}
    write("sweep", {**tree, **env}, table, options.out)
    _plot(bench.score, cells, options.out / "sweep.png")


def _plot(name: str, cells: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="rank", ylabel=name, xscale="log", xticks=RANKS, xticklabels=map(str, RANKS))
    for scale in SCALES:
        of = [cell["scores"] for cell in cells if cell["scale"] == scale]
        axes.plot(RANKS, [np.mean(scores) for scores in of], marker="o", label=f"alpha = {scale:g} x rank")
        axes.fill_between(RANKS, [min(scores) for scores in of], [max(scores) for scores in of], alpha=0.15)
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
