"""The forms of a run's model for a task: base, quantized base, tuned, merged, bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.eval.bundle_model import BundleModel
from qlora_kit.eval.generating_form import GeneratingForm, TextReader
from qlora_kit.eval.seq2seq_bundle_model import Seq2SeqBundleModel
from qlora_kit.eval.task_form import TaskForm
from qlora_kit.eval.task_readers import fitted, reader_of
from qlora_kit.export.bundle import REJECTED
from qlora_kit.model.load import to_reference
from qlora_kit.train.restore import best_device, load_run_base, load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder


def find_task_forms(run: RunFolder, batch_size: int | None = None) -> dict[str, Callable[[], TaskForm]]:
    """Name of each form that `run` has now, and a function that loads it.

    Args:
        batch_size: instead of the recipe's eval.batch_size.

    Raises:
        RunError: the run was never trained.
    """
    recipe, device, task = run.recipe(), best_device(), run_task(run)
    tokenizer = load_run_tokenizer(run)
    size = batch_size or recipe.eval.batch_size

    def formed(model: nn.Module) -> TaskForm:
        reader = reader_of(task, tokenizer, fitted(recipe.data, model))
        if isinstance(reader, TextReader):
            return GeneratingForm(model, task, tokenizer, reader, size, recipe.eval.max_new_tokens)
        return TaskForm(model, task, tokenizer, reader, size)

    def form(load: Callable[[], PreTrainedModel]) -> Callable[[], TaskForm]:
        def opened() -> TaskForm:
            model = load()
            return formed(to_reference(model) if recipe.eval.dtype == "fp32" else model)

        return opened

    def merged() -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, task.auto_class).from_pretrained(
            run.merged, device_map={"": device}
        )
        if not task.processor:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def bundle(folder: Path) -> Callable[[], TaskForm]:
        def opened() -> TaskForm:
            if task.settings.type == "seq2seq":
                return formed(Seq2SeqBundleModel(folder))
            return formed(BundleModel(folder, task.settings.type, task.labels))

        return opened

    forms = {"base": form(lambda: load_run_base(run, "none", device))}
    if recipe.base.quant != "none":
        forms[f"base_{recipe.base.quant}"] = form(lambda: load_run_base(run, recipe.base.quant, device))
    if run.adapter.is_dir():
        forms["tuned"] = form(lambda: load_tuned(run, device))
    if run.merged.is_dir():
        forms["merged"] = form(merged)
    for manifest in sorted(run.bundles.glob("[a-z]*/manifest.json")):
        if manifest.parent.suffix != REJECTED:
            forms[f"bundle_{manifest.parent.name}"] = bundle(manifest.parent)
    return forms
