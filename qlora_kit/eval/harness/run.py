"""`qlora-kit eval --tasks`: standard benchmarks on every form of a run's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlora_kit.errors import EvalError
from qlora_kit.eval.code.run import CodeResult, Settings, check_settings, run_humaneval
from qlora_kit.eval.harness.install import lm_eval_version
from qlora_kit.eval.harness.results import Benchmarks, Metric, TaskScore, merge_benchmarks
from qlora_kit.eval.harness.show import plot_benchmarks, print_benchmarks
from qlora_kit.eval.run import find_forms
from qlora_kit.eval.scorers import BundleScorer, TorchScorer
from qlora_kit.train.restore import load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

_HUMANEVAL = "humaneval"

Form = TorchScorer | BundleScorer
Score = Callable[[str, Form], dict[str, TaskScore]]
"""Name of a form, and the form, to its scores."""


def run_benchmarks(
    run: RunFolder,
    console: Console,
    tasks: list[str],
    only: list[str] | None = None,
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    code: Settings | None = None,
) -> Benchmarks:
    """Scores the forms of `run` on lm-eval's `tasks`, adds them to RUN/eval/benchmarks.json and draws benchmarks.png.

    Args:
        only: names of forms; all that exist when left out.
        task_data: folder with the benchmarks' files (`local_rows`); None reads lm-eval's data sets from the hub.
        limit: rows of each task, from the first on.
        few_shot: examples in the prompt, instead of each task's own number.
        code: how HumanEval's programs are drawn and run; one greedy program a problem when left out.

    Returns: all scores of the run, those of earlier calls included.

    Raises:
        EvalError: a task or form is not there, lm-eval is not installed, or the run's model does not generate.
        DataError: a benchmark's file is missing or wrong.
    """
    recipe, tokenizer = run.recipe(), load_run_tokenizer(run)
    if not recipe.task.answers_with_text:
        raise EvalError("benchmarks ask a model that generates", got=recipe.task.type, allowed="causal_lm")
    forms = find_forms(run, tokenizer)
    for name in only or []:
        if name not in forms:
            raise EvalError("no such form", got=name, allowed=", ".join(forms), fix="Export first for bundles")
    adapter = run.manifest().get("adapter", {}).get("sha256")
    scorers = _scorers(run, tasks, task_data, limit, few_shot, adapter, console, code or Settings())
    merged: Benchmarks = {}
    for name in only or forms:
        try:
            form: Any = forms[name]()
            scores: dict[str, TaskScore] = {}
            for score in scorers:
                console.print(f"scoring {name}", highlight=False)
                scores |= score(name, form)
        except torch.OutOfMemoryError:
            console.print(f"{name} does not fit into this device's memory and is left out", highlight=False)
            continue
        merged = merge_benchmarks(run.path, {name: scores}, adapter)  # kept even if the next form fails
    if merged:
        plot_benchmarks(merged, run.path / "eval" / "benchmarks.png")
        print_benchmarks(merged, console)
    return merged


def _scorers(
    run: RunFolder,
    tasks: list[str],
    task_data: Path | None,
    limit: int | None,
    few_shot: int | None,
    adapter: str | None,
    console: Console,
    code: Settings,
) -> list[Score]:
    """What scores a form: lm-eval on its tasks, and HumanEval in its sandbox. Bad names and files fail here."""
    scorers: list[Score] = []
    harness = [name for name in tasks if name != _HUMANEVAL]
    if harness:
        tools = {"lm-eval": lm_eval_version()}
        from qlora_kit.eval.harness.scoring import score_form_on
        from qlora_kit.eval.harness.tasks import load_tasks

        loaded = load_tasks(harness, task_data, few_shot)
        source = "local files" if task_data else "hub"

        def by_lm_eval(name: str, form: Form) -> dict[str, TaskScore]:
            trained_on = None if name.startswith("base") else adapter
            return score_form_on(form, loaded, limit, source, trained_on, tools)

        scorers.append(by_lm_eval)
    if _HUMANEVAL in tasks:
        file = _humaneval_file(task_data)
        check_settings(code)

        def by_humaneval(name: str, form: Form) -> dict[str, TaskScore]:
            out = run.path / "eval" / f"humaneval_{name}.json"
            result = run_humaneval(form, file, code, out=out, max_problems=limit, tell=console.print)
            return {_HUMANEVAL: _humaneval_score(result, file, None if name.startswith("base") else adapter)}

        scorers.append(by_humaneval)
    return scorers


def _humaneval_file(task_data: Path | None) -> Path:
    if task_data is None:
        raise EvalError(
            "humaneval runs programs that a model wrote, in a sandbox of ours and not through lm-eval",
            fix="Give --task-data FOLDER with FOLDER/humaneval/HumanEval.jsonl",
        )
    return task_data / _HUMANEVAL / "HumanEval.jsonl"


def _humaneval_score(result: CodeResult, file: Path, adapter: str | None) -> TaskScore:
    from qlora_kit.eval.code.humaneval import read_problems
    from qlora_kit.eval.code.pass_at_k import pass_at_k
    from qlora_kit.model.source import sha256_file

    metrics = {
        f"pass@{k}": Metric(found.value, found.low, found.high, higher_is_better=True, share=True)
        for k, found in result.pass_at_k.items()
    }
    passed = [sum(sample.outcome == "passed" for sample in drawn) for drawn in result.samples.values()]
    settings = result.settings
    asked = "" if settings == Settings() else f" {asdict(settings)}"  # other settings are another question
    return TaskScore(
        metrics=metrics,
        rows=len(result.samples),
        rows_in_all=len(read_problems(file)),
        few_shot=0,
        version="1",
        source="local files",
        fingerprint=f"{sha256_file(file)} {len(result.samples)}{asked}",
        adapter=adapter,
        tools={},
        per_row={f"pass@{k}": [pass_at_k(settings.samples, count, k) for count in passed] for k in settings.ks},
    )
