"""Does the plan know what training takes? Planned against measured peak memory on a CPU, over a grid.

    python scripts/bench_memory.py [--cells fit|judged|all] [--work FOLDER] [--threads 1] [--again]

Each cell trains two steps through the toolkit's own `train`, in a fresh process, on a base of a published model's exact
shape (its first layer and vocabulary random, the other layers zeros that take no disk), on rows of up to `sequence`
tokens. Measured is the most anonymous memory, looked at every few milliseconds, above what the process held when its
libraries were imported. Eight cells are there to fit the plan's one constant (plan/overhead.py), 24 others, drawn by
the seed below, judge it; how many tokens a cell may have is limited per model, so that two steps end in minutes.
What is in benchmarks/memory.json is kept (--again measures it anew); the plans are made anew each time.
Linux only. Writes benchmarks/memory.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench_7b import write_tokenizer
from bench_runs import RESULTS, hardware_line, this_machine, write
from make_shapes import shapes, write_shape

MIB = 2**20
SEED, FITTED, JUDGED = 7, 8, 24
MEDIAN_BAR, WORST_BAR, WORST_MIB = 0.03, 0.08, 64
# Tokens of a micro batch at most: what two steps on two cores end in minutes.
MODELS = {"smollm2-135m": 16384, "qwen2.5-0.5b": 8192, "qwen2.5-1.5b": 4096, "mistral-7b": 1024}
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", choices=["fit", "judged", "all"], default="all")
    parser.add_argument("--only", nargs="+", default=list(MODELS), help="only cells of these models")
    parser.add_argument("--allocator", choices=["tight", "fast"], default="tight", help="train.allocator of all cells")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_memory"), help="where the bases lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-gib", type=float, default=12, help="leave out cells that are planned to take more")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = _known(options)
    for number, (kind, cell) in enumerate(grid()):
        if options.cells in (kind, "all") and cell["model"] in options.only:
            key = _key(cell, options)
            if key not in known:
                known[key] = {"kind": kind, "number": number, **cell, **_measure(cell, options)}
            known[key]["planned_bytes"] = _planned(cell, options).total_bytes
            _show(known[key])
            _report(options, sorted(known.values(), key=lambda row: row["number"]))


def grid() -> Iterator[tuple[str, Cell]]:
    """(fit or judged, cell): drawn so that each model has a quarter of both."""
    drawn = random.Random(SEED)
    cells = {model: [cell for cell in _all_cells(model)] for model in MODELS}
    for model in MODELS:
        drawn.shuffle(cells[model])
    for kind, count in (("fit", FITTED), ("judged", JUDGED)):
        for model in MODELS:
            for _ in range(count // len(MODELS)):
                yield kind, cells[model].pop()


def _all_cells(model: str) -> Iterator[Cell]:
    large = model == "mistral-7b"
    sizes = product(
        (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8), (True, False), ("nf4", "int8", "none"), (8, 16, 32, 64)
    )
    for sequence, rows, checkpointing, quant, rank in sizes:
        if sequence * rows > MODELS[model] or (large and (quant != "nf4" or not checkpointing)):
            continue
        if not checkpointing and sequence * rows > MODELS[model] // 4:  # what is kept must fit into 12 GiB
            continue
        yield {
            "model": model,
            "sequence": sequence,
            "rows": rows,
            "checkpointing": checkpointing,
            "quant": quant,
            "rank": rank,
        }


def _key(cell: Cell, options: argparse.Namespace) -> str:
    return json.dumps(cell | {"allocator": options.allocator}, sort_keys=True)


def _known(options: argparse.Namespace) -> dict[str, Cell]:
    file = options.out / f"{_name(options)}.json"
    if options.again or not file.exists():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["cells"]
    fields = ("model", "sequence", "rows", "checkpointing", "quant", "rank")
    return {_key({field: row[field] for field in fields}, options): row for row in rows}


def _name(options: argparse.Namespace) -> str:
    return "memory" if options.allocator == "tight" else f"memory_{options.allocator}"


def _recipe(cell: Cell, options: argparse.Namespace) -> Any:
    from qlora_kit.recipe_file import parse_recipe

    folder = options.work / cell["model"]
    return parse_recipe(
        {
            "run": {"name": "cell", "out_dir": str(folder / "runs")},
            "base": {"model": str(folder), "quant": cell["quant"]},
            "adapter": {"rank": cell["rank"], "target_modules": "all-linear"},
            "data": {"train": str(folder / f"rows-{cell['sequence']}.jsonl"), "max_seq_len": cell["sequence"]},
            "train": {
                "micro_batch_size": cell["rows"],
                "gradient_checkpointing": cell["checkpointing"],
                "max_steps": 2,
                "eval_batches": 1,
                "threads": options.threads,
                "allocator": options.allocator,
            },
            "eval": {"samples": 0, "batch_size": 1},
        }
    )


def _planned(cell: Cell, options: argparse.Namespace) -> Any:
    from qlora_kit.plan import plan_recipe

    _prepare(cell, options)
    return plan_recipe(_recipe(cell, options), "cpu")


def _prepare(cell: Cell, options: argparse.Namespace) -> None:
    """The base of a cell, and rows of nearly as many tokens as it asks for, of lengths that differ."""
    folder, sequence = options.work / cell["model"], cell["sequence"]
    if not (folder / "tokenizer.json").exists():
        write_shape(shapes()[cell["model"]], folder, zeros_from=1)
        write_tokenizer(folder)
    rows = folder / f"rows-{sequence}.jsonl"
    if not rows.exists():
        text = "".join(chr(97 + place * 7 % 26) for place in range(sequence))  # a token a character, and one at the end
        lines = [json.dumps({"text": text[1 + place % 16 :]}) for place in range(64)]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _measure(cell: Cell, options: argparse.Namespace) -> Cell:
    """The cell's run in a process of its own."""
    _prepare(cell, options)
    planned = _planned(cell, options).total_bytes
    if planned > options.most_gib * 2**30:
        return {"left_out": f"planned {planned / 2**30:.1f} GiB", "measured_bytes": None}
    from qlora_kit.recipe_file import dump_recipe

    recipe = _recipe(cell, options)
    run = Path(recipe.run.out_dir) / recipe.run.name
    file = options.work / "cell.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_kit.cli", "train", "--quiet", "--overwrite", str(file)]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{cell}: {done.stderr}")
    results = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["results"]
    shutil.rmtree(run)
    return {"measured_bytes": results["peak_bytes"]}


def _error(row: Cell) -> float:
    return float(row["planned_bytes"] / row["measured_bytes"] - 1)


def _show(row: Cell) -> None:
    measured = row["measured_bytes"] and f"{row['measured_bytes'] / MIB:.0f} MiB ({100 * _error(row):+.1f}%)"
    print(f"{_described(row)}: planned {row['planned_bytes'] / MIB:.0f} MiB, measured {measured}", file=sys.stderr)


def _described(row: Cell) -> str:
    again = "checkpointed" if row["checkpointing"] else "all kept"
    return f"{row['model']} {row['quant']} {row['rows']} x {row['sequence']} {again} rank {row['rank']}"


def _report(options: argparse.Namespace, rows: list[Cell]) -> None:
    env = this_machine() | {}
    env["machine"]["threads"] = options.threads
    measured = [row for row in rows if row["measured_bytes"]]
    judged = [row for row in measured if row["kind"] == "judged"]
    lines = [
        f"| {row['kind']} | {_described(row)} | {row['planned_bytes'] / MIB:.0f} | {row['measured_bytes'] / MIB:.0f} "
        f"| {100 * _error(row):+.1f}% |"
        for row in measured
    ]
    table = (
        "# Planned against measured memory, on a CPU\n\n"
        f"Two steps of `train`, fresh processes, `train.allocator={options.allocator}`, seed {SEED}. MiB of anonymous "
        "memory above what the libraries took. The plan's one constant was set on cells of an earlier draw; those "
        "called fit agree.\n\n"
        f"{_verdict(judged)}\n\n| | cell | planned | measured | error |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n`python scripts/bench_memory.py` on "
        + hardware_line(env)
    )
    write(_name(options), {"seed": SEED, "cells": rows, **env}, table, options.out)
    _plot(measured, options.out / f"{_name(options)}.png")


def _verdict(judged: list[Cell]) -> str:
    if not judged:
        return "No cell judged yet."
    errors = [abs(_error(row)) for row in judged]
    over = [row for row in judged if _over(row)]
    worst = max(judged, key=lambda row: abs(_error(row)))
    return (
        f"{len(judged)} of {JUDGED} judged: median error {100 * statistics.median(errors):.1f}% "
        f"(bar {100 * MEDIAN_BAR:.0f}%), largest {100 * max(errors):.1f}% ({_described(worst)}); "
        f"{len(over)} over max({100 * WORST_BAR:.0f}%, {WORST_MIB} MiB)."
    )


def _over(row: Cell) -> bool:
    allowed = max(WORST_BAR * row["measured_bytes"], WORST_MIB * MIB)
    return bool(abs(row["planned_bytes"] - row["measured_bytes"]) > allowed)


def _plot(rows: list[Cell], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in (("fit", "x"), ("judged", "o")):
        own = [row for row in rows if row["kind"] == kind]
        measured, planned = ([row[f"{name}_bytes"] / 2**30 for row in own] for name in ("measured", "planned"))
        axes.scatter(measured, planned, marker=marker, label=kind)
    ends = [min(row["measured_bytes"] for row in rows) / 2**30, max(row["measured_bytes"] for row in rows) / 2**30]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.set(xlabel="measured peak, GiB", ylabel="planned peak, GiB", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
