"""Does a rank that grows learn what the large rank learns? Held-out loss and time of three ways, over seeds.

    python scripts/bench_growth.py [--seeds 0 1 2] [--steps 100]

Rank 16 from the start; rank 4 that grows to 16 after 15% of the steps; rank 4. All scale by 2. And what growing does to
the loss at that moment: of the run of rank 4, in fp32, before and after its adapter grows.
Writes benchmarks/growth.json and .md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, against, environment, hardware_line, manifest, metrics, train_run, write

VARIANTS = {
    "16": ["adapter.rank=16", "adapter.alpha=32.0"],
    "4 to 16": ["adapter.rank=4", "adapter.alpha=8.0", "adapter.growth=[{at: 0.15, rank: 16}]"],
    "4": ["adapter.rank=4", "adapter.alpha=8.0"],
}
ROWS = 8  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one run (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_growth"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    runs = {variant: [_train(options, variant, seed) for seed in options.seeds] for variant in VARIANTS}
    results = {variant: [_result(run) for run in of] for variant, of in runs.items()}
    _report(options, results, _losses_when_growing(runs["4"][0]), environment(runs["16"][0]))


def _train(options: argparse.Namespace, variant: str, seed: int) -> Path:
    overrides = [
        *VARIANTS[variant],
        f"run.seed={seed}",
        f"train.threads={options.threads}",
        f"train.max_steps={options.steps}",
        f"train.warmup_steps={min(10, options.steps // 4)}",
        f"train.micro_batch_size={ROWS}",
        "train.grad_accum_steps=1",
        f"train.eval_every={options.steps}",
        "train.eval_batches=16",
    ]
    name = f"rank-{variant.replace(' ', '-')}-seed{seed}-steps{options.steps}"
    return train_run("smollm2-sentiment", name, options.runs, overrides)


def _result(run: Path) -> dict[str, Any]:
    steps = metrics(run, "train")
    return {
        "eval_loss": metrics(run, "eval")[-1]["loss"],  # after the last step
        "train_loss": [record["loss"] for record in steps],
        "step_s": float(np.mean([record["tokens"] / record["tokens_per_s"] for record in steps])),
        "trained_weights": manifest(run)["results"]["trainable_params"],
    }


def _losses_when_growing(folder: Path) -> tuple[float, float]:
    """Loss of held-out rows in fp32, in nats a token, before and after a rank of 4 becomes 16."""
    import torch

    from qlora_kit.adapters.peft_format import load_adapter
    from qlora_kit.data.collate import collate
    from qlora_kit.data.dataset import prepare
    from qlora_kit.model.load import to_reference
    from qlora_kit.train.restore import load_run_base, load_run_tokenizer
    from qlora_kit.train.run_folder import RunFolder

    run = RunFolder.open(folder)
    recipe, tokenizer, model = run.recipe(), load_run_tokenizer(run), load_run_base(run)
    method: Any = load_adapter(model, run.adapter)
    batch = collate(list(prepare(recipe.data, tokenizer, recipe.run.seed).eval)[:32], tokenizer.pad_token_id)
    reference, losses = to_reference(model.eval()), []
    with torch.no_grad():
        for rank in (4, 16):
            method.change_rank(reference, method.settings.model_copy(update={"rank": rank, "alpha": 2.0 * rank}))
            losses.append(float(reference(**batch).loss))
    return losses[0], losses[1]


def _report(
    options: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]],
    moment: tuple[float, float],
    env: dict[str, Any],
) -> None:
    losses = {variant: [result["eval_loss"] for result in of] for variant, of in results.items()}
    rows = [
        f"| {variant} | {np.mean(losses[variant]):.4f} | {against(losses, variant, '16')} "
        f"| {np.mean([result['step_s'] for result in of]):.2f} | {of[0]['trained_weights']:,} |"
        for variant, of in results.items()
    ]
    table = (
        "# A rank that grows\n\n"
        f"SmolLM2-135M, NF4 base, sentiment, {options.steps} steps of {ROWS} rows, seeds {options.seeds}. "
        "`4 to 16` grows after 15% of the steps; all scale by 2.\n\n"
        "| rank | held-out loss | against 16, paired 95% t interval | s a step | trained weights at the end |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"At the moment of growth the loss of 32 held-out rows in fp32 was {moment[0]:.9g} before and {moment[1]:.9g} "
        f"after: it moved by {moment[1] - moment[0]:g}.\n\n"
        f"`python scripts/bench_growth.py --steps {options.steps}` on " + hardware_line(env)
    )
    tree = {"seeds": options.seeds, "steps": options.steps, "results": results, "loss_when_growing": moment, **env}
    write("growth", tree, table, options.out)


if __name__ == "__main__":
    main()
