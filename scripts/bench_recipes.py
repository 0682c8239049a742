"""What does each shipped recipe reach? Trained as it stands but for the number of steps, scored on held-out rows.

    python scripts/bench_recipes.py minilm-topics smollm2-translation ... [--steps 60] [--rows 100]

In a folder with the recipes' demo/ and data/. Recipes of decoders are scored on the quantized base, too. Writes
benchmarks/recipes.json and .md; a recipe that is in there, of as many steps and rows, is kept and not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_runs import RESULTS, environment, hardware_line, manifest, train_run, write

from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import load_recipe

SHOWN = ("accuracy", "macro_f1", "span_f1", "f1", "exact_match", "bleu", "nist", "meteor_exact_stem", "chrf", "rougeL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--steps", type=int, default=60, help="of decoders; encoders train as their recipe says")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of decoders")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of one run (default 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_recipes"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    file = options.out / "recipes.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, Any] = tree.get("recipes", {})
    for name in options.recipes:
        recipe = load_recipe(name)
        asked = {"steps": options.steps, "rows": options.rows} if recipe.task.type == "causal_lm" else None
        if name not in found or found[name].get("asked") != asked:
            run = _train(options, name, recipe)
            found[name] = _result(run) | {"asked": asked}
            _report(options, found, environment(run))  # each time: what is done stays done


def _train(options: argparse.Namespace, name: str, recipe: Recipe) -> Path:
    generates = recipe.task.type == "causal_lm"
    short = [f"train.max_steps={options.steps}", "train.epochs=null", "train.save_every=null"] if generates else []
    run = train_run(name, name, options.runs, [f"train.threads={options.threads}", *short])
    if not (run / "eval" / "results.json").exists():
        more = ["--forms", "base_nf4,tuned", "--rows", str(options.rows)] if generates else ["--forms", "tuned"]
        subprocess.run([sys.executable, "-m", "qlora_kit.cli", "eval", str(run), *more], check=True)
    return run


def _result(run: Path) -> dict[str, Any]:
    forms = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))["forms"]
    scores = {
        name: {"rows": form["rows"], "loss": form["loss"], "accuracy": form["accuracy"], **form.get("scores", {})}
        for name, form in forms.items()
    }
    made = manifest(run)
    return {"forms": scores, "steps": made["step"], "wall_s": made["results"]["wall_s"]}


def _report(options: argparse.Namespace, found: dict[str, Any], env: dict[str, Any]) -> None:
    rows = []
    for name, result in found.items():
        for form, scores in result["forms"].items():
            known = [key for key in SHOWN if scores.get(key) and not (key == "exact_match" and "bleu" in scores)]
            shown = [f"{key} {_words(scores[key])}" for key in known]
            rows.append(
                f"| {name} | {form} | {result['steps'] if form == 'tuned' else ''} | {scores['rows']} "
                f"| {_words(scores['loss'])} | {', '.join(shown)} |"
            )
    table = (
        "# What the shipped recipes reach\n\n"
        "Trained as the recipe says, but for the steps of decoders. Held-out rows, loss in nats a token (a row or "
        "window of encoders);\nbrackets are 95% bootstrap intervals over rows.\n\n"
        "| recipe | form | steps | rows | loss | scores |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "`python scripts/bench_recipes.py RECIPE ... --steps STEPS --rows ROWS` on " + hardware_line(env)
    )
    write("recipes", {"recipes": found, **env}, table, options.out)


def _words(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


if __name__ == "__main__":
    main()
