"""Is NF4 with LoRA as good as full fine-tuning in 16 bit? Four tasks with a small encoder, the same rows and steps.

    python scripts/bench_encoders.py --model PATH/minilm --data PATH [--tasks sentiment ...] [--seeds 0 1 2]

PATH holds banking77/ (train.csv, test.csv), wnut17/ (wnut17train.conll, emerging.test.annotated), sentiment/
(train.jsonl, eval.jsonl with text and label) and addresses/labeled.xml (usaddress' training data). A tuned model's
score is that of its held-out rows. Writes benchmarks/encoders.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_runs import RESULTS, against, environment, hardware_line, manifest, train_run, write


@dataclass(frozen=True)
class Bench:
    """One task: its kind, its files, its length and the score it is judged by."""

    type: str
    train: str
    eval: str
    steps: int
    score: str


BENCHES = {
    "sentiment": Bench("classification", "sentiment/train.jsonl", "sentiment/eval.jsonl", 200, "accuracy"),
    "banking77": Bench("classification", "banking77/train.csv", "banking77/test.csv", 400, "accuracy"),
    "wnut17": Bench("tagging", "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated", 200, "span_f1"),
    "addresses": Bench("tagging", "addresses.jsonl", "addresses-eval.jsonl", 200, "span_f1"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4, lora": {"adapter.method": "lora", "adapter.rank": 16, "adapter.alpha": 32, "train.lr": 1e-3},
    "16 bit, full": {"base.quant": "none", "adapter.method": "full", "train.lr": 1e-4},
}
ROWS = 16  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four datasets")
    parser.add_argument("--tasks", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of one run (default 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_encoders"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    if "addresses" in options.tasks:
        write_addresses(options.data / "addresses" / "labeled.xml", options.runs)
    found = {
        task: {name: [_train(options, task, name, seed) for seed in options.seeds] for name in VARIANTS}
        for task in options.tasks
    }
    _report(found, options.out)


def write_addresses(labeled: Path, folder: Path, held_out: int = 200) -> None:
    """Addresses as words with BIO tags: a part of an address is a span. Of the first 1000, every fifth is held out."""
    rows = [_address(element) for element in ElementTree.parse(labeled).getroot()]
    eval_rows = rows[::5][:held_out]
    train_rows = [row for k, row in enumerate(rows) if k % 5 or k // 5 >= held_out]
    for name, part in (("addresses", train_rows), ("addresses-eval", eval_rows)):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in part)
        (folder / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")


def _address(element: ElementTree.Element) -> dict[str, list[str]]:
    words, tags, before = [], [], ""
    for part in element:
        for word in (part.text or "").split():
            words.append(word)
            tags.append(f"{'I' if part.tag == before else 'B'}-{part.tag}")
            before = part.tag
    return {"words": words, "tags": tags}


def _train(options: argparse.Namespace, task: str, name: str, seed: int) -> Path:
    """A trained and evaluated run."""
    bench = BENCHES[task]
    folder = options.runs if task == "addresses" else options.data
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": "unnamed", "seed": seed},
        "task": {"type": bench.type},
        "base": {"model": str(options.model)},
        "adapter": {},
        "data": {"train": str(folder / bench.train), "eval": str(folder / bench.eval), "max_seq_len": 128},
        "train": {"micro_batch_size": ROWS, "max_steps": bench.steps, "warmup_steps": 30, "optimizer": "adamw"},
        "eval": {"batch_size": 32},
    }
    recipe["data"]["overlong"] = "truncate"
    recipe["train"] |= {"gradient_checkpointing": False, "threads": options.threads, "save_every": None}
    for key, value in VARIANTS[name].items():
        section, _, field = key.partition(".")
        recipe[section][field] = value
    file = options.runs / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run = train_run(str(file), f"{task}-{name.replace(', ', '-').replace(' ', '')}-seed{seed}", options.runs, [])
    if not (run / "eval" / "results.json").exists():
        subprocess.run([sys.executable, "-m", "qlora_kit.cli", "eval", str(run), "--forms", "tuned"], check=True)
    return run


def _report(found: dict[str, dict[str, list[Path]]], out: Path) -> None:
    scores = {
        task: {name: [_score(run, BENCHES[task].score) for run in runs] for name, runs in by_name.items()}
        for task, by_name in found.items()
    }
    rows: list[str] = []
    tree: dict[str, dict[str, Any]] = {}
    for task, by_name in scores.items():
        bench, reference = BENCHES[task], "16 bit, full"
        for name, values in by_name.items():
            results = [manifest(run)["results"] for run in found[task][name]]
            difference = against(by_name, name, reference)
            rows.append(
                f"| {task} ({bench.score}) | {name} | {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f}) "
                f"| {difference} | {results[0]['trainable_params']:,} "
                f"| {np.mean([result['wall_s'] for result in results]):.0f} |"
            )
            tree.setdefault(task, {})[name] = {"score": bench.score, "values": values, "results": results}
    table = (
        "# NF4 with LoRA against full fine-tuning in 16 bit: MiniLM (22 million weights)\n\n"
        "Held-out scores, mean over seeds and their range; the difference is paired by seed, with a 95% t interval.\n\n"
        "| task | method | score | less 16 bit, full | trained weights | seconds of training |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
    )
    env = environment(next(iter(next(iter(found.values())).values()))[0])
    table += f"{ROWS} rows a step; steps: {', '.join(f'{task} {BENCHES[task].steps}' for task in found)}.\n"
    write("encoders", {"environment": env, "tasks": tree}, table + hardware_line(env), out)


def _score(run: Path, name: str) -> float:
    forms: dict[str, Any] = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))["forms"]
    return float(forms["tuned"]["scores"][name]["value"])


if __name__ == "__main__":
    main()
