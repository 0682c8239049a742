"""`qlora-kit eval`: the run's own held-out rows, or with --tasks standard benchmarks."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qlora_kit.errors import EvalError
from qlora_kit.eval.code.run import Settings
from qlora_kit.eval.code.sandbox import Limits
from qlora_kit.eval.harness.run import run_benchmarks
from qlora_kit.eval.run import evaluate_run
from qlora_kit.train.run_folder import RunFolder

CODE_OPTIONS = ("samples", "pass_at", "temperature", "seed", "time_limit", "memory_limit")
"""Options that only humaneval has."""


def eval_command(options: argparse.Namespace, path: str | Path) -> Path:
    """Does what the options of `eval` ask of the run at `path`; returns its folder.

    Raises:
        EvalError: options that do not go together, and as `evaluate_run` and `run_benchmarks`.
    """
    if options.tasks is None and (options.task_data or options.limit or options.few_shot is not None):
        raise EvalError("--task-data, --limit and --few-shot go with --tasks", fix="Name benchmarks: --tasks gsm8k")
    given = [name for name in CODE_OPTIONS if getattr(options, name) is not None]
    if given and "humaneval" not in (options.tasks or []):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise EvalError("only humaneval draws programs and runs them", got=names, fix="Add --tasks humaneval")
    if options.tasks is not None and options.rows:
        raise EvalError("--rows counts held-out rows, not those of --tasks", fix="Give --limit instead")
    run, console = RunFolder.open(path), Console()
    if options.tasks is None:
        evaluate_run(run, console, options.forms, options.rows)
    else:
        folder = Path(options.task_data) if options.task_data else None
        limits = {"limit": options.limit, "few_shot": options.few_shot}
        code = code_settings(options)
        run_benchmarks(run, console, options.tasks, options.forms, task_data=folder, code=code, **limits)
    return run.path


def code_settings(options: argparse.Namespace) -> Settings:
    """How programs are drawn and run, as the options of `eval` say; what they leave out is as `Settings` has it."""
    drawn = {
        "samples": options.samples,
        "ks": tuple(options.pass_at) if options.pass_at else None,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    limits = Limits()
    if options.time_limit is not None:  # a program that computes all the time may, up to a second of rounding
        limits = replace(limits, wall_s=options.time_limit, cpu_s=math.ceil(options.time_limit))
    if options.memory_limit is not None:
        limits = replace(limits, memory_bytes=options.memory_limit << 20)
    return replace(Settings(limits=limits), **{name: value for name, value in drawn.items() if value is not None})
