"""Devices, processes and trackers, through accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe
from qlora_kit.train.run_folder import RunFolder


def make_accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Devices, processes and trackers.

    Raises:
        RunError: a tracker is not installed, or the recipe cannot be had with several processes.
    """
    for tracker in recipe.train.trackers:
        if find_spec(tracker) is None:
            raise RunError(
                f"train.trackers: {tracker} is not installed",
                fix=f'Run `pip install "qlora-kit[{tracker}]"`, or leave it out',
            )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else processes launched together on CPUs would not find each other
        mixed_precision="no",  # the model is loaded in its compute dtype; nothing is cast on the way
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(run.path / "trackers"),
    )
    if getattr(recipe.adapter, "growth", []) and accelerator.num_processes > 1:
        raise RunError(
            "adapter.growth needs one process",
            got=accelerator.num_processes,
            allowed="1 process",
            fix="Launch one, or leave growth out",
        )
    return accelerator


def spread(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    """The model as it is, or wrapped so that several processes average their gradients.

    Quantized codes are buffers that never change: they are not sent around at each step.
    """
    if accelerator.num_processes == 1:
        return model
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    return accelerator.prepare_model(model)
