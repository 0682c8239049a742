"""Do bf16 adapters learn like fp32 ones? Loss curves of three ways to store an adapter, over seeds.

    python scripts/bench_precision.py [--seeds 0 1 2] [--steps 100]

fp32; bf16 with its low 16 bits kept (the default); bf16 alone. Writes benchmarks/adapter_precision.json, .md, .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, against, environment, hardware_line, metrics, train_run, write
from safetensors.torch import load_file

VARIANTS = {
    "fp32": ["adapter.dtype=fp32"],
    "bf16 + low bits": ["adapter.dtype=bf16", "adapter.keep_precision=true"],
    "bf16 alone": ["adapter.dtype=bf16", "adapter.keep_precision=false"],
}


ROWS = 8  # a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one run (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_precision"))
    options = parser.parse_args()
    runs = {
        variant: [_train(options, variant, seed) for seed in options.seeds]
        for variant in VARIANTS
    }  # fmt: skip
    curves = {v: [[r["loss"] for r in metrics(run, "train")] for run in of] for v, of in runs.items()}
    evals = {v: [[r["loss"] for r in metrics(run, "eval")] for run in of] for v, of in runs.items()}
    final = {v: [curve[-1] for curve in of] for v, of in evals.items()}  # after the last step
    apart = {v: [weights_apart(run, other) for run, other in zip(of, runs["fp32"])] for v, of in runs.items()}
    _plot(curves, evals, options.steps)
    _report(options, curves, evals, final, apart, environment(runs["fp32"][0]))


def weights_apart(run: Path, reference: Path) -> float:
    """‖B A - B' A'‖ / ‖B' A'‖ over all layers (Frobenius), A' and B' being the reference's."""
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, reference))
    difference = whole = 0.0
    for name in (key for key in theirs if key.endswith("lora_A.weight")):
        of_b = name.replace("lora_A", "lora_B")
        delta = theirs[of_b].float() @ theirs[name].float()
        difference += (ours[of_b].float() @ ours[name].float() - delta).square().sum().item()
        whole += delta.square().sum().item()
    return float((difference / whole) ** 0.5)


def _train(options: argparse.Namespace, variant: str, seed: int) -> Path:
    overrides = [
        *VARIANTS[variant],
        f"run.seed={seed}",
        f"train.threads={options.threads}",
        f"train.lr={options.lr}",
        f"train.max_steps={options.steps}",
        f"train.micro_batch_size={ROWS}",
        f"train.eval_every={max(1, options.steps // 6)}",
        "train.eval_batches=16",
    ]
    name = f"{variant.replace(' + ', '-').replace(' ', '-')}-seed{seed}"
    return train_run("smollm2-sentiment", name, options.out, overrides)


def _plot(curves: dict[str, Any], evals: dict[str, Any], steps: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for (variant, of), style in zip(curves.items(), ("-", "--", ":")):
        mean = np.mean(of, axis=0)
        smooth = np.convolve(mean, np.ones(5) / 5, mode="valid")
        left.plot(np.arange(len(smooth)) + 3, smooth, style, label=variant)
        held_out = np.array(evals[variant])
        at = np.linspace(steps / held_out.shape[1], steps, held_out.shape[1])
        right.errorbar(at, held_out.mean(0), held_out.std(0, ddof=1), fmt=f"o{style}", capsize=3, label=variant)
    left.set(title="training loss, mean over seeds, 5-step mean", xlabel="step", ylabel="nats a token", yscale="log")
    right.set(title="held-out loss, mean ± s.d. over seeds", xlabel="step", ylabel="nats a token")
    left.legend()
    right.legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "adapter_precision.png", dpi=110)


def _report(
    options: argparse.Namespace,
    curves: Any,
    evals: Any,
    final: dict[str, list[float]],
    apart: dict[str, list[float]],
    env: Any,
) -> None:
    reference = np.array(curves["fp32"])
    rows = []
    for variant in VARIANTS:
        curve = float(np.abs(np.array(curves[variant]) - reference).mean())
        weights = f"{np.mean(apart[variant]):.1%} ± {np.std(apart[variant], ddof=1):.1%}"
        paired = against(final, variant, "fp32", digits=5)
        rows.append(f"| {variant} | {np.mean(final[variant]):.5f} | {paired} | {curve:.5f} | {weights} |")
    table = (
        "# Adapter storage: does bf16 learn like fp32?\n\n"
        f"SmolLM2-135M, NF4 base, sentiment, {options.steps} steps of {ROWS} rows, lr {options.lr}, "
        f"seeds {options.seeds}.\n\n"
        "| adapter | held-out loss | against fp32, paired 95% t interval | mean distance of its training curve "
        "| distance of its B A from fp32's |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n![curves](adapter_precision.png)\n\n"
        f"`python scripts/bench_precision.py --steps {options.steps} --lr {options.lr}` on " + hardware_line(env)
    )
    tree = {"seeds": options.seeds, "steps": options.steps, "lr": options.lr, "train_loss": curves, "eval_loss": evals,
            "final_eval_loss": final, "weights_apart": apart, **env}  # fmt: skip
    write("adapter_precision", tree, table)


if __name__ == "__main__":
    main()
