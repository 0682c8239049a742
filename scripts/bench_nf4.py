"""NF4 training against training on the 16-bit base: GSM8K answers, held-out loss, paired over seeds.

    python scripts/bench_nf4.py --data PATH/gsm8k [--seeds 0 1 2] [--steps 120]

Same rows, same order, same steps; only base.quant differs. Writes benchmarks/nf4_vs_16bit.json and .md.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_runs import environment, hardware_line, manifest, train_run, write

ROWS = 4  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one run (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_nf4"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    held_out = options.out / "eval.jsonl"
    lines = (options.data / "test.jsonl").read_text(encoding="utf-8").splitlines()[: options.eval_rows]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    runs = {
        (seed, quant): _train(options, held_out, seed, quant) for seed in options.seeds for quant in ("nf4", "none")
    }
    zero_shot = _zero_shot(runs[options.seeds[0], "nf4"])
    losses = {q: [manifest(runs[s, q])["results"]["final_eval_loss"] for s in options.seeds] for q in ("nf4", "none")}
    _report(options, zero_shot, losses, environment(runs[options.seeds[0], "nf4"]))


def _train(options: argparse.Namespace, held_out: Path, seed: int, quant: str) -> Path:
    overrides = [
        f"data.train={options.data / 'train.jsonl'}",
        f"data.eval={held_out}",
        f"run.seed={seed}",
        f"train.threads={options.threads}",
        f"base.quant={quant}",
        f"train.max_steps={options.steps}",
        f"train.micro_batch_size={ROWS}",
    ]
    return train_run("smollm2-gsm8k", f"{quant}-seed{seed}", options.out, overrides)


def _zero_shot(run: Path) -> dict[str, float]:
    """Held-out loss of both bases before any training, by the run's own evaluation."""
    from rich.console import Console

    from qlora_kit.eval.run import find_forms, held_out_rows
    from qlora_kit.train.restore import load_run_tokenizer
    from qlora_kit.train.run_folder import RunFolder

    folder = RunFolder.open(run)
    recipe, tokenizer = folder.recipe(), load_run_tokenizer(folder)
    plain = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"answer": "none"})})
    rows: Any = held_out_rows(plain, tokenizer, None)
    found = {}
    for name, quant in (("base", "none"), ("base_nf4", "nf4")):
        Console(stderr=True).print(f"zero-shot loss of {name}")
        losses = find_forms(folder, tokenizer)[name]().losses(rows)
        found[quant] = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    return found


def _report(options: argparse.Namespace, zero_shot: dict[str, float], losses: dict[str, list[float]], env: Any) -> None:
    import numpy as np

    from qlora_kit.eval.intervals import paired_t_interval, t_interval

    nf4, none = np.array(losses["nf4"]), np.array(losses["none"])
    percent = t_interval(100 * (nf4 / none - 1))
    difference = paired_t_interval(nf4, none)
    gap_before = zero_shot["nf4"] - zero_shot["none"]
    closed = t_interval(1 - (nf4 - none) / gap_before)
    tree = {
        "seeds": options.seeds,
        "steps": options.steps,
        "eval_rows": options.eval_rows,
        "zero_shot_loss": zero_shot,
        "final_loss": losses,
        "final_percent": asdict(percent),
        "gap_closed": asdict(closed),
        **env,
    }
    rows = [
        f"| before training | {zero_shot['none']:.4f} | {zero_shot['nf4']:.4f} | "
        f"{gap_before:+.4f} ({100 * (zero_shot['nf4'] / zero_shot['none'] - 1):+.1f}%) |"
    ]
    rows += [
        f"| after, seed {seed} | {b:.4f} | {a:.4f} | {a - b:+.4f} ({100 * (a / b - 1):+.2f}%) |"
        for seed, a, b in zip(options.seeds, nf4, none)
    ]
    nats = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    share = f"{percent.value:+.2f}% [{percent.low:+.2f}, {percent.high:+.2f}]"
    rows.append(f"| after, mean | {none.mean():.4f} | {nf4.mean():.4f} | {nats}; {share} |")
    verdict = "within" if percent.value <= 2 else "not within"
    table = (
        "# NF4 base against 16-bit base\n\nSmolLM2-135M, GSM8K answers, "
        f"{options.steps} steps of {ROWS} rows, held-out loss in nats a token on {options.eval_rows} test rows.\n"
        "Brackets are paired 95% t intervals over seeds.\n\n"
        "| | 16-bit base | NF4 base | difference |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nThe final loss is {verdict} 2% of the 16-bit base's; training closed {closed.value:.0%} "
        f"[{closed.low:.0%}, {closed.high:.0%}] of the gap that quantization opened.\n\n"
        + f"`python scripts/bench_nf4.py --data PATH/gsm8k --steps {options.steps}` on "
        + hardware_line(env)
    )
    write("nf4_vs_16bit", tree, table)


if __name__ == "__main__":
    main()
