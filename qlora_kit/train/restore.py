"""A finished run back in memory: its base, its adapter, its tokenizer."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.errors import RunError
from qlora_kit.model.load import DTYPES, load_base, load_tokenizer
from qlora_kit.model.source import find_base
from qlora_kit.recipe import Recipe
from qlora_kit.train.run_folder import RunFolder


def load_run_tokenizer(run: RunFolder) -> PreTrainedTokenizerBase:
    """The tokenizer that the run trained with: new tokens and chat template included.

    Raises:
        RunError: the run did not get that far.
    """
    if not run.tokenizer.is_dir():
        raise RunError(f"{run.path} has no tokenizer folder: it was never trained", fix="Train it first")
    return load_tokenizer(run.tokenizer)


def load_run_base(run: RunFolder, quant: str | None = None, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The base model of a run as it was trained on, or in another quantization.

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
    return load_base(
        source,
        base.quant if quant is None else quant,
        base.double_quant,
        DTYPES[base.compute_dtype],
        device,
        skip,
        base.trust_remote_code,
    )


def load_tuned(run: RunFolder, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The trained model: quantized base with the run's adapter, in its compute dtype, in evaluation mode.

    Raises:
        RunError: the run has no adapter yet.
    """
    if not run.adapter.is_dir():
        raise RunError(f"{run.path} holds no adapter yet", fix=f"Finish it: qlora-kit train --resume {run.path}")
    model = load_run_base(run, device=device)
    load_adapter(model, run.adapter)
    return model.eval()


def best_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
