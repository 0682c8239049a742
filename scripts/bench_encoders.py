"""Is NF4 with LoRA as good as full fine-tuning in 16 bit? Four tasks with a small encoder, the same rows and steps.

    python scripts/bench_encoders.py --model PATH/minilm --data PATH [--tasks sentiment ...] [--seeds 0 1 2]

PATH holds banking77/ (train.csv, test.csv), wnut17/ (wnut17train.conll, emerging.test.annotated), sentiment/
(train.jsonl, eval.jsonl with text and label) and addresses/labeled.xml (usaddress' training data). A tuned model's
score is that of its held-out rows. Writes benchmarks/encoders.json and .md; what is in there, of as many steps, stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_runs import RESULTS, against, environment, hardware_line, manifest, train_run, write
from prepare_data import addresses, write_rows

Found = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Task to variant to seed to results."""


@dataclass(frozen=True)
class Bench:
    """One task: its kind, its files, its length and the score it is judged by."""

    type: str
    train: str
    eval: str
    steps: int
    score: str
    lora_lr: float
    full_lr: float
    warmup: int = 30


BENCHES = {
    "sentiment": Bench("classification", "sentiment/train.jsonl", "sentiment/eval.jsonl", 300, "accuracy", 5e-4, 1e-4),
    "banking77": Bench("classification", "banking77/train.csv", "banking77/test.csv", 600, "accuracy", 1e-3, 3e-4),
    "wnut17": Bench(
        "tagging", "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated", 800, "span_f1", 6e-4, 2e-4, 100
    ),
    "addresses": Bench("tagging", "addresses.jsonl", "addresses-eval.jsonl", 300, "span_f1", 1e-3, 3e-4),
}
FULL = "16 bit, full"
LORA: dict[str, Any] = {"method": "lora", "rank": 16, "alpha": 32}
VARIANTS: dict[str, dict[str, Any]] = {  # the recipe's adapter section
    "nf4, lora": LORA,
    FULL: {"method": "full"},
    "nf4, lora, rank 4": {"method": "lora", "rank": 4, "alpha": 8},
    "nf4, lora+": {**LORA, "lr_ratio": 8.0},
    "nf4, dora": {**LORA, "method": "dora"},
    "nf4, dora, rank 4": {"method": "dora", "rank": 4, "alpha": 8},
    "nf4, pissa": {**LORA, "method": "pissa"},
    "nf4, loftq": {**LORA, "method": "loftq"},
    "nf4, adalora": {**LORA, "method": "adalora"},
    "nf4, sora": {**LORA, "method": "sora"},
    "nf4, bottleneck": {"method": "bottleneck"},
    "nf4, bitfit": {"method": "bitfit"},
    "int4, lora": LORA,
    "int4, qa_lora": {**LORA, "method": "qa_lora"},
}
LR_FACTORS = {"nf4, adalora": 5.0, "nf4, bitfit": 3.0}  # of lora's: one starts nearer to zero, one trains only biases
TABLE = ("nf4, lora", FULL)  # the others are asked for by name
ROWS = 16  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four datasets")
    parser.add_argument("--tasks", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(TABLE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of one run (default 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_encoders"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    prepare(options, options.tasks)
    found = read_results(options.out)
    for seed in options.seeds:
        for task in options.tasks:
            for name in options.variants:
                by_seed = found.setdefault(task, {}).setdefault(name, {})
                if by_seed.get(str(seed), {}).get("lr") != _lr(task, name):
                    quant = "none" if name == FULL else name.split(", ")[0]
                    run = tuned_run(options, task, name, VARIANTS[name], _lr(task, name), seed, quant)
                    by_seed[str(seed)] = {"score": score(run, task), "lr": _lr(task, name), **manifest(run)["results"]}
                    _report(found, environment(run), options.out)  # each time: what is done stays done


def prepare(options: argparse.Namespace, tasks: list[str]) -> None:
    """Makes options.runs, with the rows of the addresses in it where they are among the tasks."""
    options.runs.mkdir(parents=True, exist_ok=True)
    if "addresses" in tasks:
        for name, rows in zip(("addresses", "addresses-eval"), addresses(options.data)):
            write_rows(options.runs / f"{name}.jsonl", rows)


def read_results(out: Path) -> Found:
    """Those of earlier runs, if they were as long."""
    file = out / "encoders.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {task: found for task, found in tree.get("tasks", {}).items() if tree["steps"][task] == BENCHES[task].steps}


def _lr(task: str, name: str) -> float:
    return BENCHES[task].full_lr if name == FULL else BENCHES[task].lora_lr * LR_FACTORS.get(name, 1.0)


def tuned_run(
    options: argparse.Namespace,
    task: str,
    name: str,
    adapter: dict[str, Any],
    lr: float,
    seed: int,
    quant: str = "nf4",
) -> Path:
    """A trained and evaluated run of an adapter section of the recipe, called after `name`."""
    bench = BENCHES[task]
    folder = options.runs if task == "addresses" else options.data
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": "unnamed", "seed": seed},
        "task": {"type": bench.type},
        "base": {"model": str(options.model)},
        "adapter": adapter,
        "data": {"train": str(folder / bench.train), "eval": str(folder / bench.eval), "max_seq_len": 128},
        "train": {
            "micro_batch_size": ROWS,
            "max_steps": bench.steps,
            "warmup_steps": bench.warmup,
            "optimizer": "adamw",
        },
        "eval": {"batch_size": 32},
    }
    recipe["data"]["overlong"] = "truncate"
    recipe["train"] |= {"gradient_checkpointing": False, "threads": options.threads, "save_every": None}
    recipe["train"]["lr"] = lr
    recipe["base"]["quant"] = quant
    file = options.runs / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    folder_name = f"{task}-{name.replace(', ', '-').replace(' ', '').replace('+', '-plus')}-lr{lr:g}-seed{seed}"
    run = train_run(str(file), folder_name, options.runs, [])
    if not (run / "eval" / "results.json").exists():
        subprocess.run([sys.executable, "-m", "qlora_kit.cli", "eval", str(run), "--forms", "tuned"], check=True)
    return run


def _report(found: Found, env: dict[str, Any], out: Path) -> None:
    rows = [_row(task, name, of) for task, of in found.items() for name in VARIANTS if of.get(name)]
    table = (
        "# A small encoder: NF4 with adapters against full fine-tuning in 16 bit\n\n"
        "MiniLM (22 million weights). Held-out scores, mean over seeds and their range; the difference is paired by "
        "seed,\nwith a 95% t interval.\n\n"
        "| task | variant | seeds | score | less 16 bit, full | trained weights | seconds | tokens/s | peak, GiB |\n"
        + "| --- " * 9
        + "|\n"
        + "\n".join(rows)
        + "\n\n"
    )
    steps = {task: BENCHES[task].steps for task in found}
    table += f"{ROWS} rows a step; steps: {', '.join(f'{task} {count}' for task, count in steps.items())}.\n\n"
    table += "`python scripts/bench_encoders.py --model PATH/minilm --data PATH` on " + hardware_line(env)
    write("encoders", {"steps": steps, "tasks": found, **env}, table + "\n![scores](encoders.png)\n", out)
    _plot(found, out / "encoders.png")


def _plot(found: Found, file: Path) -> None:
    """Each variant's scores over seeds, and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (task, of) in zip(figure.subplots(1, len(found), sharey=False), found.items(), strict=True):
        names = [name for name in reversed(VARIANTS) if of.get(name)]
        for place, name in enumerate(names):
            scores = [result["score"] for result in of[name].values()]
            axes.plot(scores, [place] * len(scores), "o", color="0.6", markersize=4)
            axes.plot(np.mean(scores), place, "|", color="C0", markersize=14)
        axes.set(title=task, xlabel=BENCHES[task].score, yticks=range(len(names)), yticklabels=names)
    figure.savefig(file, dpi=110)


def _row(task: str, name: str, of: dict[str, dict[str, Any]]) -> str:
    scores = {other: [by[seed]["score"] for seed in of[name] if seed in by] for other, by in of.items()}
    values, results = scores[name], list(of[name].values())
    paired = len(scores.get(FULL, [])) == len(values)
    return (
        f"| {task} ({BENCHES[task].score}) | {name} | {len(values)} "
        f"| {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f}) "
        f"| {against(scores, name, FULL) if paired else ''} | {results[0]['trainable_params']:,} "
        f"| {np.mean([result['wall_s'] for result in results]):.0f} "
        f"| {np.mean([result['tokens_per_s'] for result in results]):.0f} "
        f"| {max(result['peak_rss_bytes'] for result in results) / 2**30:.2f} |"
    )


def score(run: Path, task: str) -> float:
    forms: dict[str, Any] = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))["forms"]
    return float(forms["tuned"]["scores"][BENCHES[task].score]["value"])


if __name__ == "__main__":
    main()
