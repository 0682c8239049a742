"""A finished run back in memory: its base, its adapter, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.adapters.methods import METHODS
from qlora_kit.adapters.peft_format import load_adapter, read_adapter
from qlora_kit.errors import RunError
from qlora_kit.model.load import DTYPES, load_base, load_tokenizer
from qlora_kit.model.processor import load_processor
from qlora_kit.model.source import find_base
from qlora_kit.recipe import Recipe
from qlora_kit.tasks.registry import task_class, task_of
from qlora_kit.tasks.task import Task
from qlora_kit.train.adapted_model import architecture_of, int4_grid
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.run_folder import RunFolder


def load_run_tokenizer(run: RunFolder) -> Any:
    """The tokenizer that the run trained with, new tokens and chat template included; of images or sounds their
    processor.

    Raises:
        RunError: the run did not get that far.
    """
    if not run.tokenizer.is_dir():
        raise RunError(f"{run.path} has no tokenizer folder: it was never trained", fix="Train it first")
    task = run.recipe().task
    if processor := task_class(task).processor:
        return load_processor(run.tokenizer, processor)
    return load_tokenizer(run.tokenizer, generates=task.answers_with_text)


def run_task(run: RunFolder) -> Task[Any]:
    """The task of a run, with the labels that it was trained on.

    Raises:
        RunError: the run did not get that far.
    """
    settings, known = run.recipe().task, run.manifest().get("task")
    if known is None and settings.type != "causal_lm":
        raise RunError(f"{run.path} does not know its labels: it was never trained", fix="Train it first")
    return task_of(settings, known["labels"] if known else [])


def load_run_base(
    run: RunFolder, quant: str | None = None, device: str | torch.device = "cpu", quantize_later: bool = False
) -> PreTrainedModel:
    """The base model of a run, in its quantization or in another; whole where it is to be quantized later.

    Args:
        quant: none, given so, is of the head too.

    Raises:
        RunError: the base is not the one the run was trained on.
    """
    recipe: Recipe = run.recipe()
    base = recipe.base
    source = find_base(base.model, base.revision, base.trust_remote_code)
    trained_on = run.manifest().get("base", {}).get("fingerprint")
    if trained_on not in (None, source.fingerprint()):
        raise RunError(f"{run.path} was trained on another model than {base.model} now holds", fix="Put its files back")
    skip = list(recipe.adapter.modules_to_save)
    torch.manual_seed(seed_for(recipe.run.seed, "head"))
    task = run_task(run)
    model = load_base(
        source,
        base.quant if quant is None else quant,
        base.double_quant,
        DTYPES[base.compute_dtype],
        device,
        skip,
        base.trust_remote_code,
        quantize_later=quantize_later,
        architecture=architecture_of(task),
        grid=int4_grid(base),
        cache=base.cache,
        head_quant="none" if quant == "none" else base.head_quant,
        host_embeddings=base.embeddings == "host",
    )
    if not task.processor:
        model.config.pad_token_id = load_run_tokenizer(run).pad_token_id
    return model


def load_tuned(run: RunFolder, device: str | torch.device = "cpu", adapter: Path | None = None) -> PreTrainedModel:
    """The trained model: quantized base with the run's adapter, in its compute dtype, in evaluation mode.

    Args:
        adapter: the folder of another one, used instead of the run's own.

    Raises:
        RunError: the run has no adapter yet.
        AdapterError: the adapter does not fit the run's base.
    """
    if adapter is not None:
        model = load_run_base(run, device=device, quantize_later=read_adapter(adapter).method.replaces_base)
        load_adapter(model, adapter)
        return model.eval()
    if not run.adapter.is_dir():
        raise RunError(f"{run.path} holds no adapter yet", fix=f"Finish it: qlora-kit train --resume {run.path}")
    replaced = METHODS[run.recipe().adapter.method].replaces_base
    model = load_run_base(run, device=device, quantize_later=replaced)
    load_adapter(model, run.adapter)
    return model.eval()


def best_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
