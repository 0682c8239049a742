"""What does it cost to merge an adapter onto other weights than those it was trained on? Over runs of several tasks.

    python scripts/bench_merge.py RUN RUN ... [--max-rows 200]

The adapter of each run, trained on a quantized base, merged onto the dequantized base, onto the base's own 16-bit
weights, and rounded to the base's codes again after merging; loss and accuracy on the run's held-out rows, in fp32, as
differences from the trained model with paired 95% bootstrap intervals. Writes benchmarks/merge.json and .md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_runs import RESULTS, hardware_line, this_machine, write
from rich.console import Console

from qlora_kit.data.eval_rows import completions_in
from qlora_kit.eval.forms import FormResult, compare_forms, score_form
from qlora_kit.eval.run import held_out_rows, score_rows
from qlora_kit.eval.scorers import TorchScorer
from qlora_kit.export.onto import merge_onto
from qlora_kit.model.load import to_reference
from qlora_kit.recipe import EvalSection
from qlora_kit.train.restore import load_run_base, load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder

FORMS = ("base", "base, quantized", "tuned", "dequantized", "original", "requantized")
"""The last three are what the adapter was merged onto."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs that generate, on quantized bases")
    parser.add_argument("--max-rows", type=int, default=None, help="held-out rows of each (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    found = {}
    for folder in options.runs:
        found[folder.name] = _score(RunFolder.open(folder), options.max_rows)
        _report(found, options.out)  # each time: what is done stays done


def _score(run: RunFolder, max_rows: int | None) -> dict[str, FormResult]:
    recipe, tokenizer = run.recipe(), load_run_tokenizer(run)
    if recipe.eval.answer != "choices":  # generated answers of a small model tell less than their loss, and take hours
        recipe = recipe.model_copy(update={"eval": EvalSection(batch_size=recipe.eval.batch_size)})
    questions = held_out_rows(recipe, tokenizer, max_rows)
    choices = list(recipe.eval.choices) or (completions_in(recipe.data) if recipe.eval.answer == "choices" else [])
    results = {}
    for form in FORMS:
        started = time.perf_counter()
        scorer = TorchScorer(to_reference(_model(run, form)), tokenizer, recipe.eval.batch_size)
        per_row = score_rows(scorer, questions, recipe, tokenizer, choices)
        results[form] = score_form(per_row, time.perf_counter() - started)
        Console(stderr=True).print(f"{run.path.name}, {form}: loss {results[form].loss.value:.4f}", highlight=False)
    return results


def _model(run: RunFolder, form: str) -> Any:
    if form.startswith("base"):
        return load_run_base(run, "none" if form == "base" else None)
    model = load_tuned(run)
    if form != "tuned":
        merge_onto(run, model, form)  # type: ignore[arg-type]
    return model


def _report(found: dict[str, dict[str, FormResult]], out: Path) -> None:
    rows, tree = [], {}
    for run, forms in found.items():
        for name, form in forms.items():
            against = "" if name == "tuned" else _difference(forms, name, "loss")
            accuracy = "" if form.accuracy is None else f"{form.accuracy.value:.1%}"
            more = "" if form.accuracy is None or name == "tuned" else _difference(forms, name, "accuracy")
            rows.append(f"| {run} | {name} | {form.rows} | {form.loss.value:.4f} | {against} | {accuracy} | {more} |")
        tree[run] = {name: _kept(form) for name, form in forms.items()}
    environment = this_machine()
    table = (
        "# Merging onto the weights that were trained on, and onto others\n\n"
        "Held-out loss in nats a token, and accuracy where answers are checked, in fp32; differences from the trained "
        "model\nwith paired 95% bootstrap intervals over rows.\n\n"
        "| run | form | rows | loss | less tuned | accuracy | less tuned |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n`python scripts/bench_merge.py RUN ...` on {hardware_line(environment)}"
    )
    write("merge", {"runs": tree, **environment}, table, out)


def _difference(forms: dict[str, FormResult], name: str, metric: Any) -> str:
    pair = compare_forms(forms, name, "tuned", metric)
    return f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"


def _kept(form: FormResult) -> dict[str, Any]:
    per_row: Sequence[float] = form.per_row.loss
    return {
        "rows": form.rows,
        "loss": form.loss.value,
        "accuracy": form.accuracy.value if form.accuracy else None,
        "loss_per_row": [round(value, 5) for value in per_row],
        "correct": form.per_row.correct,
    }


if __name__ == "__main__":
    main()
