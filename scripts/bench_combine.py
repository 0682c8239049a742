"""Do two adapters, combined, still do both tasks? Movie reviews and GSM8K answers, held-out loss with SmolLM2.

    python scripts/bench_combine.py --data PATH/gsm8k [--steps 60] [--rows 100]

Trains one adapter for each task, combines them by each rule, and takes the loss of both tasks' held-out rows. Kept is
the share of a task's own gain: (base - combined) / (base - own). Writes benchmarks/combine.json and .md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, hardware_line, this_machine, train_run, write

TASKS = {"reviews": "smollm2-sentiment", "maths": "smollm2-gsm8k"}
WAYS: dict[str, list[str]] = {  # weights are those of both adapters
    "cat, weights 1": ["--method", "cat", "--weights", "1,1"],
    "cat, weights 0.7": ["--method", "cat", "--weights", "0.7,0.7"],
    "cat, weights 0.5": ["--method", "cat", "--weights", "0.5,0.5"],
    "cat, weights 0.5 and 1": ["--method", "cat", "--weights", "0.5,1"],
    "cat, weights 0.3 and 1": ["--method", "cat", "--weights", "0.3,1"],
    "ties_svd, half, weights 0.5 and 1": ["--method", "ties_svd", "--density", "0.5", "--weights", "0.5,1"],
    "ties, half, weights 0.5 and 1": ["--method", "ties", "--density", "0.5", "--weights", "0.5,1"],
    "svd to rank 16, weights 1": ["--method", "svd", "--rank", "16", "--weights", "1,1"],
    "linear, weights 1": ["--method", "linear", "--weights", "1,1"],
    "ties_svd, half": ["--method", "ties_svd", "--density", "0.5", "--weights", "1,1"],
    "ties, half": ["--method", "ties", "--density", "0.5", "--weights", "1,1"],
    "dare_linear_svd, half": ["--method", "dare_linear_svd", "--density", "0.5", "--weights", "1,1"],
    "dare_ties_svd, half": ["--method", "dare_ties_svd", "--density", "0.5", "--weights", "1,1"],
    "magnitude_prune_svd, half": ["--method", "magnitude_prune_svd", "--density", "0.5", "--weights", "1,1"],
}
ROWS_AT_ONCE = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each task")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_combine"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    folders = {task: _train(options, task) for task in TASKS}
    losses = {"base": _losses(options, folders, None)}
    for task, folder in folders.items():
        losses[task] = _losses(options, folders, folder / "adapter")
    for way in WAYS:
        losses[way] = _losses(options, folders, _combine(options, list(folders.values()), way))
        _report(options, losses)  # each time: what is done stays done


def _train(options: argparse.Namespace, task: str) -> Path:
    data = [f"data.train={options.data / 'train.jsonl'}", f"data.eval={options.data / 'test.jsonl'}"]
    overrides = [
        f"train.max_steps={options.steps}",
        f"train.threads={options.threads}",
        "train.micro_batch_size=8",
        "train.eval_every=null",
        "train.eval_batches=1",
        "run.seed=0",
        *(data if task == "maths" else []),
    ]
    return train_run(TASKS[task], task, options.runs, overrides)


def _combine(options: argparse.Namespace, folders: list[Path], way: str) -> Path:
    made = options.runs / way.replace(", ", "-").replace(" ", "-")
    if not made.is_dir():
        command = [sys.executable, "-m", "qlora_kit.cli", "adapters", "combine", *map(str, folders), "-o", str(made)]
        subprocess.run([*command, *WAYS[way]], check=True)
    return made


def _losses(options: argparse.Namespace, folders: dict[str, Path], adapter: Path | None) -> dict[str, np.ndarray]:
    """Task to summed loss and loss tokens of each held-out row, [rows, 2]; of the base where `adapter` is None."""
    import torch

    from qlora_kit.data.collate import collate
    from qlora_kit.data.dataset import prepare_eval
    from qlora_kit.data.report import DataReport
    from qlora_kit.model.quantized import expanded
    from qlora_kit.tasks.loss import row_losses
    from qlora_kit.train.restore import load_run_base, load_run_tokenizer, load_tuned
    from qlora_kit.train.run_folder import RunFolder

    torch.set_num_threads(options.threads)
    run = RunFolder.open(next(iter(folders.values())))
    model: Any = load_run_base(run) if adapter is None else load_tuned(run, adapter=adapter)
    tokenizer, found = load_run_tokenizer(run), {}
    with expanded(model, torch.bfloat16):
        for task, folder in folders.items():
            rows = prepare_eval(RunFolder.open(folder).recipe().data, tokenizer, DataReport([]))[: options.rows]
            batches = [rows[k : k + ROWS_AT_ONCE] for k in range(0, len(rows), ROWS_AT_ONCE)]
            sums = [torch.stack(row_losses(model, collate(part, tokenizer.pad_token_id)), 1) for part in batches]
            found[task] = torch.cat(sums).double().numpy()
    return found


def _mean(losses: np.ndarray) -> float:
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def _kept(losses: dict[str, dict[str, np.ndarray]], way: str, task: str) -> Any:
    """Share of the task's own gain, with a bootstrap interval over rows."""
    from qlora_kit.eval.intervals import bootstrap

    def share(rows: np.ndarray) -> np.ndarray:
        sums = {form: losses[form][task][rows].sum(1) for form in ("base", task, way)}  # [resamples, 2]
        means = {form: both[:, 0] / both[:, 1] for form, both in sums.items()}
        return (means["base"] - means[way]) / (means["base"] - means[task])

    return bootstrap(len(losses["base"][task]), share, 2000, 0.95, 0)


def _report(options: argparse.Namespace, losses: dict[str, dict[str, np.ndarray]]) -> None:
    means = {form: {task: _mean(values) for task, values in of.items()} for form, of in losses.items()}
    kept = {way: {task: _kept(losses, way, task) for task in TASKS} for way in losses if way in WAYS}
    rows = [
        f"| {form} | " + " | ".join(f"{means[form][task]:.4f} |" for task in TASKS) + " |" for form in ("base", *TASKS)
    ]
    for way, of in kept.items():
        cells = [f"{means[way][task]:.4f} | {k.value:.0%} [{k.low:.0%}, {k.high:.0%}]" for task, k in of.items()]
        rows.append(f"| {way} | " + " | ".join(cells) + " |")
    tree: dict[str, Any] = {"steps": options.steps, "rows": options.rows, "loss": means, **this_machine()}
    tree["kept"] = {way: {task: asdict(share) for task, share in of.items()} for way, of in kept.items()}
    table = (
        "# Two adapters combined\n\n"
        f"SmolLM2-135M on NF4, LoRA rank 16, one adapter for movie reviews and one for GSM8K answers, {options.steps} "
        f"steps\nof 8 rows each. Loss in nats a token on {options.rows} held-out rows of each task; kept is the share "
        "of what the\ntask's own adapter gains.\nBrackets are 95% bootstrap intervals over rows.\n\n"
        "| adapter | reviews: loss | kept | maths: loss | kept |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"`python scripts/bench_combine.py --data PATH/gsm8k --steps {options.steps} --rows {options.rows}` on "
    )
    write("combine", tree, table + hardware_line(tree), options.out)


if __name__ == "__main__":
    main()
