"""What does each method do to a real task? GSM8K answers or E2E descriptions with SmolLM2 on an NF4 base, over seeds.

    python scripts/bench_methods.py gsm8k --data PATH/gsm8k [--methods lora dora ...] [--seeds 0 1 2] [--steps 120]
    python scripts/bench_methods.py e2e --data PATH/e2e

Held-out loss, of E2E the BLEU of generated texts too, trained weights, peak memory and speed of each. Writes
benchmarks/methods_TASK.json, .md and .png; what is in there, of as many steps and rows and of the same settings, is
kept and not run again.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_runs import RESULTS, against, environment, hardware_line, manifest, merged, metrics, train_run, write
from e2e_texts import text_scores, write_e2e

from qlora_kit.adapter_tools.listing import describe
from qlora_kit.recipe_file import load_recipe, recipe_to_tree

LORA: dict[str, Any] = {"rank": 16, "alpha": 32}
VARIANTS: dict[str, tuple[dict[str, Any], list[str]]] = {  # the recipe's adapter section, and overrides
    "lora": (LORA, []),
    "lora, rank 4": ({"rank": 4, "alpha": 8}, []),
    "lora, rank 4 to 16": ({"rank": 4, "alpha": 8, "growth": [{"at": 0.5, "rank": 16}]}, []),
    "lora, rank 4 to 16 early": ({"rank": 4, "alpha": 8, "growth": [{"at": 0.15, "rank": 16}]}, []),
    "lora, 16 bit": (LORA, ["base.quant=none"]),
    "rslora": ({**LORA, "use_rslora": True}, []),  # scales by 8 where lora scales by 2
    "lora+": ({**LORA, "lr_ratio": 16.0}, ["train.lr=1e-4"]),
    "dora": ({**LORA, "method": "dora"}, []),
    "dora, rank 4": ({"method": "dora", "rank": 4, "alpha": 8}, []),
    "pissa": ({**LORA, "method": "pissa"}, []),
    "loftq": ({**LORA, "method": "loftq"}, []),
    "loftq, by inputs": ({**LORA, "method": "loftq", "calibration_rows": 64, "calibration": "full"}, []),
    "adalora": ({**LORA, "method": "adalora"}, ["train.lr=5e-3"]),  # it starts nearer to zero: lora's lr is too low
    "sora": ({**LORA, "method": "sora"}, []),
    "bottleneck": ({"method": "bottleneck"}, []),
    "prompt tuning": ({"method": "prompt_tuning"}, ["train.lr=3e-2"]),
    "lora, distilled": (LORA, ["train.distill={teacher: base, temperature: 1.0}"]),
    "lora, tuned teacher": (LORA, ["train.distill={teacher: TUNED, temperature: 1.0}"]),
    "lora, int4": (LORA, ["base.quant=int4"]),
    "qa_lora, int4": ({**LORA, "method": "qa_lora"}, ["base.quant=int4"]),
    "full, 16 bit": ({"method": "full"}, ["base.quant=none", "train.lr=1e-4"]),
}
TEACHER: tuple[dict[str, Any], list[str]] = ({**LORA, "use_rslora": True}, ["base.quant=none"])
"""What is trained first, on the same rows, where a method has TUNED for a teacher."""


@dataclass(frozen=True)
class Bench:
    """One task.

    Attributes:
        rows: rows of a step.
        write: writes the held-out rows that are scored from the folder of the data, and says which overrides use them.
        scores: of a finished run by name, its `bleu` in 0..100; None where only the loss counts.
    """

    recipe: str
    title: str
    rows: int
    write: Callable[[Path, Path, int], list[str]]
    scores: Callable[[Path], dict[str, float]] | None = None


def write_gsm8k(data: Path, held_out: Path, rows: int) -> list[str]:
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"data.train={data / 'train.jsonl'}", f"data.eval={held_out}"]


BENCHES = {
    "gsm8k": Bench("smollm2-gsm8k", "GSM8K answers", 4, write_gsm8k),
    "e2e": Bench("smollm2-e2e", "E2E, sentences from facts", 8, write_e2e, text_scores),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=BENCHES)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of the task")
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one run (default 1)")
    parser.add_argument("--note", default="", help="a sentence written under the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_methods"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    held_out, bench = options.runs / "eval.jsonl", BENCHES[options.task]
    overrides = bench.write(options.data, held_out, options.eval_rows)
    results = _read_results(options)
    for seed in options.seeds:
        for name in options.methods:
            if str(seed) not in results.setdefault(name, {}):
                run = _train(options, overrides, name, seed, VARIANTS[name])
                results[name][str(seed)] = _result(run, name)
                if bench.scores:
                    results[name][str(seed)] |= bench.scores(run)
                _report(options, results, environment(run))  # each time: what is done stays done


def _read_results(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Method to seed to results, of earlier runs over the same steps and rows."""
    file = options.out / f"methods_{options.task}.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if (tree.get("steps"), tree.get("eval_rows")) != (options.steps, options.eval_rows):
        return {}
    return {
        name: {seed: result for seed, result in by_seed.items() if result["variant"] == list(VARIANTS[name])}
        for name, by_seed in tree["results"].items()
    }


def _result(run: Path, name: str) -> dict[str, Any]:
    shipped = describe(run / "adapter").trained_parameters
    losses = [round(record["loss"], 4) for record in metrics(run, "train")]
    return {
        **manifest(run)["results"],
        "shipped_params": shipped,
        "train_loss": losses,
        "variant": list(VARIANTS[name]),
    }


def _train(
    options: argparse.Namespace, data: list[str], name: str, seed: int, variant: tuple[dict[str, Any], list[str]]
) -> Path:
    (adapter, more), bench = variant, BENCHES[options.task]
    if any("TUNED" in override for override in more):
        teacher = merged(_train(options, data, "teacher", seed, TEACHER))
        more = [override.replace("TUNED", str(teacher.resolve())) for override in more]
    tree = recipe_to_tree(load_recipe(bench.recipe))
    recipe = options.runs / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tree, "adapter": adapter}), encoding="utf-8")
    overrides = [
        *data,
        f"run.seed={seed}",
        f"train.threads={options.threads}",
        f"train.max_steps={options.steps}",
        f"train.warmup_steps={min(10, options.steps // 4)}",
        f"train.micro_batch_size={bench.rows}",
        *more,
    ]
    folder = name.replace(", ", "-").replace(" ", "-").replace("+", "-plus")
    mark = zlib.crc32(json.dumps([adapter, overrides[len(data) :]]).encode())  # a run of other settings is another run
    return train_run(str(recipe), f"{folder}-{mark:08x}-seed{seed}", options.runs, overrides)


def _report(options: argparse.Namespace, results: dict[str, dict[str, dict[str, Any]]], env: dict[str, Any]) -> None:
    rows, bench = [], BENCHES[options.task]
    for name in (name for name in VARIANTS if results.get(name)):
        of = results[name]
        losses = {method: [by[seed]["final_eval_loss"] for seed in of if seed in by] for method, by in results.items()}
        paired = len(losses.get("lora", [])) == len(of)
        bleus = f"{np.mean([result['bleu'] for result in of.values()]):.1f} | " if bench.scores else ""
        rows.append(
            f"| {name} | {len(of)} | {bleus}{np.mean(losses[name]):.4f} "
            f"| {against(losses, name, 'lora') if paired else ''} "
            f"| {next(iter(of.values()))['trainable_params']:,} "
            f"| {np.mean([result['shipped_params'] for result in of.values()]):,.0f} "
            f"| {max(result['peak_rss_bytes'] for result in of.values()) / 2**30:.2f} "
            f"| {np.mean([result['tokens_per_s'] for result in of.values()]):.0f} |"
        )
    columns = ["method", "seeds", *(["BLEU"] if bench.scores else []), "held-out loss", "less lora", "trained weights"]
    columns += ["shipped", "peak memory, GiB", "tokens/s"]
    table = (
        f"# Methods on {bench.title}\n\n"
        f"SmolLM2-135M, NF4 base unless said otherwise, {options.steps} steps of {bench.rows} rows, held-out loss in "
        f"nats a token on {options.eval_rows} test rows.\nBrackets are 95% t intervals, paired by seed.\n\n"
        f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "\n".join(rows) + "\n\n"
        f"`python scripts/bench_methods.py {options.task} --data PATH --steps {options.steps} --eval-rows "
        f"{options.eval_rows}` "
        f"on {hardware_line(env)}"
    ) + (f"\n{options.note}\n" if options.note else "")
    tree = {"steps": options.steps, "eval_rows": options.eval_rows, "results": results, **env}
    write(f"methods_{options.task}", tree, table, options.out)
    _plot(results, options.out / f"methods_{options.task}.png")


def _plot(results: dict[str, dict[str, dict[str, Any]]], file: Path) -> None:
    """Training loss by step, the mean over seeds and ten steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss, mean of ten steps")
    for k, (name, of) in enumerate((name, results[name]) for name in VARIANTS if results.get(name)):
        losses = np.mean([result["train_loss"] for result in of.values()], axis=0)
        window = min(10, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(
            range(window, len(losses) + 1), smooth, label=name, color=f"C{k % 10}", linestyle=("-", "--")[k // 10 % 2]
        )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
