"""An evaluated run with what is known about it, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import EvalError
from qlora_kit.eval.forms import FormResult
from qlora_kit.eval.harness.results import Benchmarks, read_benchmarks
from qlora_kit.eval.results import EvalResults, read_results
from qlora_kit.export.bundle import REJECTED
from qlora_kit.task_settings import TaskSettings
from qlora_kit.train.run_folder import RunFolder

_DECIDE_SCORES = ("multi_label", "scheme", "unanswerable")
"""Settings of a task without which the same rows get other scores."""


@dataclass(frozen=True)
class EvaluatedRun:
    """One run with what is known about it."""

    name: str
    facts: dict[str, Any]
    """Trainable parameters, memory, speed, sizes; None where the run does not say."""
    asked: dict[str, Any]
    """What decides which held-out rows were scored, and what was asked of them."""
    task: TaskSettings
    results: EvalResults | None
    benchmarks: Benchmarks

    def forms(self) -> list[str]:
        return list(dict.fromkeys([*(self.results.forms if self.results else {}), *self.benchmarks]))

    def held_out(self, form: str) -> FormResult | None:
        return self.results.forms.get(form) if self.results else None


def read_run(folder: Path, name: str) -> EvaluatedRun:
    """The run in `folder`, under a name for people.

    Raises:
        EvalError: it was never evaluated.
        RunError: it is no run, or a file of it is damaged.
    """
    run = RunFolder.open(folder)
    held_out = read_results(folder) if (folder / "eval" / "results.json").exists() else None
    benchmarks = read_benchmarks(folder) if (folder / "eval" / "benchmarks.json").exists() else {}
    if held_out is None and not benchmarks:
        raise EvalError(f"{folder} was never evaluated", fix=f"qlora-kit eval {folder}")
    recipe, manifest = run.recipe(), run.manifest()
    results, data = manifest.get("results", {}), manifest.get("data", {})
    facts = {
        "base": manifest.get("base", {}).get("model"),
        "quant": recipe.base.quant,
        "adapter": recipe.adapter.method,
        "steps": manifest.get("step"),
        "trainable parameters": results.get("trainable_params"),
        "peak memory, bytes": results.get("peak_rss_bytes"),
        "peak GPU memory, bytes": results.get("peak_gpu_bytes"),
        "training, tokens/s": results.get("tokens_per_s"),
        **{
            f"bundle {file.parent.name}, bytes": _size(file.parent)
            for file in sorted(run.bundles.glob("[a-z]*/manifest.json"))
            if file.parent.suffix != REJECTED
        },
    }
    scoring = held_out.metrics if held_out else {}
    own_file = data.get("eval")
    whole = held_out is not None and own_file and held_out.rows >= data.get("eval_rows", 0)
    asked = {
        "files": [source.get("fingerprint") for source in ([own_file] if own_file else data.get("train", []))],
        "fraction": None if own_file else recipe.data.eval_fraction,
        "seed": None if whole else recipe.run.seed,
        "task": [recipe.task.type, *(getattr(recipe.task, name, None) for name in _DECIDE_SCORES)],
        "labels": sorted(scoring.get("labels") or []),
        "row_hashes": scoring.get("row_hashes"),
        "answers": [scoring.get(name) for name in ("answer", "choices")],
    }
    return EvaluatedRun(name, facts, asked, recipe.task, held_out, benchmarks)


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
