"""The interface of all methods: how an adapter enters a model, learns, is stored and leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.settings import AdapterSettings

S = TypeVar("S", bound=AdapterSettings)


class Method(Generic[S]):
    """One method of adaptation with its settings. The defaults suit a method that is its layers and nothing more.

    Class attributes:
        peft_type: what adapter_config.json calls the method.
        stored_as: own name of a weight to the name it has on disk, both relative to their layer.
        cannot_merge: why no plain model computes the same, or None where one does.
    """

    peft_type: ClassVar[str]
    stored_as: ClassVar[dict[str, str]] = {}
    cannot_merge: ClassVar[str | None] = None

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        """Freezes `model` and puts a fresh adapter in, in place. Returns the names of the adapted layers.

        Args:
            targets: full names of layers, of a stored adapter; found from the settings when left out.
        """
        raise NotImplementedError

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether a stored adapter with this adapter_config.json is one of this method."""
        return config.get("peft_type") == cls.peft_type

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        """Refuses, with an AdapterError that names the field, what this toolkit cannot compute."""

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> S:
        """The settings that an adapter_config.json means; AdapterError names a field that cannot be used."""
        raise NotImplementedError

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the trained parameter `name` is multiplied with."""
        return 1.0

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """Added to the loss of each step, scalar."""
        return None

    def after_step(self, model: PreTrainedModel, step: int, total_steps: int, lr: float) -> None:
        """Called after each optimizer step (1 to `total_steps`), with the gradients still there."""

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside weights and optimizer."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""

    def publish(self, checkpoint: Path, target: Path) -> None:
        """Writes the adapter that ships into the empty folder `target`, from the adapter of a checkpoint."""
        for file in sorted(checkpoint.iterdir()):
            (target / file.name).write_bytes(file.read_bytes())

    def stored_name(self, name: str) -> str:
        """The name on disk of the trained parameter `name`, without PEFT's prefix."""
        layer, _, own = name.rpartition(".")
        return f"{layer}.{self.stored_as[own]}" if own in self.stored_as else name


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes of adapter weights by their names in the settings."""


def dtype_name(tensors: dict[str, Tensor], marks: tuple[str, ...]) -> Literal["bf16", "fp32"]:
    """`bf16` where all stored tensors whose names hold a mark are bf16, else `fp32`."""
    dtypes = {tensor.dtype for key, tensor in tensors.items() if any(mark in key for mark in marks)}
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"
