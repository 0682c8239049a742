"""What a run writes down about itself: lines of metrics.jsonl, the manifest, the published adapter."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.errors import RunError
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import sha256_file
from qlora_kit.recipe_file import recipe_hash
from qlora_kit.train.checkpoint import TrainState
from qlora_kit.train.micro_batches import SMALLER
from qlora_kit.train.run_folder import RunFolder

if TYPE_CHECKING:
    from qlora_kit.train.loop import StepStats
    from qlora_kit.train.session import Session

TOOLS = ("qlora-kit", "torch", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def train_record(state: TrainState, stats: StepStats) -> dict[str, Any]:
    """A `train` line of metrics.jsonl."""
    scale = {} if stats.loss_scale is None else {"loss_scale": stats.loss_scale, "skipped": stats.skipped}
    return {
        "kind": "train",
        "step": state.step,
        "loss": stats.loss,
        "lr": stats.lr,
        "grad_norm": None if stats.skipped else stats.grad_norm,  # JSON has no infinity
        "tokens": stats.tokens,
        "loss_tokens": stats.loss_tokens,
        "tokens_per_s": stats.tokens / stats.seconds,
        "rss_bytes": psutil.Process().memory_info().rss,
        "gpu_bytes": gpu_peak_since_last(state),
        "elapsed_s": state.elapsed_s,
        **scale,
    }


def eval_record(state: TrainState, loss: float, tokens: int, improved: bool, perplexity: bool = True) -> dict[str, Any]:
    """An `eval` line of metrics.jsonl."""
    return {
        "kind": "eval",
        "step": state.step,
        "loss": loss,
        **({"perplexity": math.exp(min(loss, 700.0))} if perplexity else {}),
        "loss_tokens": tokens,
        "best": improved,
    }


def at_start(session: Session) -> dict[str, Any]:
    """The manifest of a run that begins."""
    template = getattr(session.tokenizer, "chat_template", None)
    quantized = [module for module in session.plain.modules() if isinstance(module, QuantizedLinear)]
    return {
        "status": "running",
        "step": 0,
        "checkpoint": None,
        "total_steps": session.total_steps,
        "recipe_sha256": recipe_hash(session.recipe),
        "task": {"type": session.task.settings.type, "labels": session.task.labels},
        "base": {
            "model": session.source.reference,
            "revision": session.source.revision,
            "fingerprint": session.source.fingerprint(),
            "files": session.source.sha256,
            "quant": session.recipe.base.quant,
            "head_quant": session.recipe.base.head_quant,
            "quantized_layers": len(quantized),
            "quantized_bytes": sum(module.stored_bytes() for module in quantized),
        },
        "data": session.data.report.to_json(),
        "tokenizer_sha256": sha256_file(_tokenizer_file(session.run)),
        "chat_template": template if isinstance(template, str) else None,
        "tools": tool_versions(),
        "machine": machine(session),
        "notes": session.notes,
        "resumes": [],
        SMALLER: session.micro_batches.smaller,
        "results": {"trainable_params": _trained_weights(session)},
    }


def _tokenizer_file(run: RunFolder) -> Path:
    """What says how rows become the model's input: the tokenizer, or how images are prepared."""
    text = run.tokenizer / "tokenizer.json"
    return text if text.is_file() else run.tokenizer / "preprocessor_config.json"


def published(run: RunFolder, step: int) -> dict[str, Any]:
    """The manifest's entry for RUN/adapter, the adapter of step `step`."""
    return {"step": step, "sha256": sha256_file(run.adapter / "adapter_model.safetensors")}


def at_end(session: Session, state: TrainState, eval_loss: float | None) -> dict[str, Any]:
    """The manifest fields of a run that is done."""
    results = session.run.manifest().get("results", {})
    keep_peaks(state)
    return {
        "status": "finished",
        "step": state.step,
        **data_fields(session),
        "results": {
            **results,
            "trainable_params": _trained_weights(session),  # a rank may have grown
            "best_step": state.best_step,
            "best_eval_loss": state.best_loss,
            "final_eval_loss": eval_loss,
            "stopped_early": state.stopped_early,
            "peak_bytes": session.watch.peak_bytes,  # of this process, above what its libraries took
            "planned_bytes": session.watch.planned_bytes,
            "peak_rss_bytes": state.peak_rss_bytes,
            "peak_gpu_bytes": state.peak_gpu_bytes or None,
            "wall_s": state.elapsed_s,
            "tokens_per_s": state.tokens_seen / max(state.step_s, 1e-9),
        },
    }


def _trained_weights(session: Session) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(session.plain).values())


def data_fields(session: Session) -> dict[str, Any]:
    """What the data has come to so far: a stream's rows are counted, and left out, only as they are read."""
    warnings = session.data.report.warnings()
    shapes = {re.sub(r"\d+", "#", warning) for warning in warnings}  # an earlier count gives way to this one
    kept = [n for n in session.run.manifest().get("notes", []) if re.sub(r"\d+", "#", n) not in shapes]
    return {"data": session.data.report.to_json(), "notes": kept + warnings}


def is_finished(run: RunFolder) -> bool:
    """Whether the run is done and its adapter is still the one that the manifest names."""
    manifest, weights = run.manifest(), run.adapter / "adapter_model.safetensors"
    if manifest.get("status") != "finished" or not weights.is_file():
        return False
    return sha256_file(weights) == manifest["adapter"]["sha256"]


def tool_versions(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: metadata.version(name) for name in (*TOOLS, *more)} | {"python": platform.python_version()}


def machine(session: Session) -> dict[str, Any]:
    """The hardware, as far as equal bits depend on it."""
    device = session.accelerator.device
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": session.threads,
        "processes": session.accelerator.num_processes,
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpu_peak_since_last(state: TrainState) -> int | None:
    """Largest GPU memory since this was last asked, kept in `state` where it is the run's largest; None without GPU."""
    if not torch.cuda.is_available():
        return None
    keep_peaks(state)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def keep_peaks(state: TrainState) -> None:
    """Largest memory of the whole run, earlier processes of it included."""
    state.peak_rss_bytes = max(state.peak_rss_bytes, peak_rss_bytes())
    if torch.cuda.is_available():
        state.peak_gpu_bytes = max(state.peak_gpu_bytes, torch.cuda.max_memory_allocated())


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; the present one where the system does not tell."""
    if os.name == "nt":
        return psutil.Process().memory_info().rss
    import resource

    factor = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def leave(session: Session, state: TrainState, status: str) -> None:
    """Writes down how the run ended; on a full disk not even that, and the first error is the one to tell."""
    if session.accelerator.is_main_process:
        with contextlib.suppress(RunError):
            session.run.update_manifest(status=status, step=state.step, **data_fields(session))
