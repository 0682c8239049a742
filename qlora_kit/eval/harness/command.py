"""`qlora-kit eval`: the run's own held-out rows, or with --tasks standard benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from qlora_kit.errors import EvalError
from qlora_kit.eval.harness.run import run_benchmarks
from qlora_kit.eval.run import evaluate_run
from qlora_kit.train.run_folder import RunFolder


def eval_command(options: argparse.Namespace, path: str | Path) -> Path:
    """Does what the options of `eval` ask of the run at `path`; returns its folder.

    Raises:
        EvalError: options that do not go together, and as `evaluate_run` and `run_benchmarks`.
    """
    if options.tasks is None and (options.task_data or options.limit or options.few_shot is not None):
        raise EvalError("--task-data, --limit and --few-shot go with --tasks", fix="Name benchmarks: --tasks gsm8k")
    if options.tasks is not None and options.rows:
        raise EvalError("--rows counts held-out rows, not those of --tasks", fix="Give --limit instead")
    run, console = RunFolder.open(path), Console()
    if options.tasks is None:
        evaluate_run(run, console, options.forms, options.rows)
    else:
        folder = Path(options.task_data) if options.task_data else None
        limits = {"limit": options.limit, "few_shot": options.few_shot}
        run_benchmarks(run, console, options.tasks, options.forms, task_data=folder, **limits)
    return run.path
