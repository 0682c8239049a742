"""The interface of all methods: how an adapter enters a model, learns, is stored and leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.settings import AdapterSettings

S = TypeVar("S", bound=AdapterSettings)
SomeBatches = Callable[[int], Iterable[Mapping[str, Tensor]]]
"""Batches of n training rows, spread over the data; fewer where there are fewer rows."""
Gain = Callable[[], float]
"""What new random weights are multiplied by, worked out where there are some."""


def plain_size() -> float:
    """They are as large as an untrained adapter's."""
    return 1.0


class Method(Generic[S]):
    """One method of adaptation with its settings. The defaults suit a method that is its layers and nothing more.

    Class attributes:
        peft_type: what adapter_config.json calls the method.
        stored_as: own name of a weight to the name it has on disk, both relative to their layer.
        stored_bare: own parameters of the model that PEFT stores without its prefix.
        stores_all: whether every weight of the base is trained and stored, a tied one once.
        replaces_base: whether the method quantizes the base itself, and so is given a whole one.
        cannot_merge: why no plain model computes the same, or None where one does.
    """

    peft_type: ClassVar[str]
    stored_as: ClassVar[dict[str, str]] = {}
    stored_bare: ClassVar[tuple[str, ...]] = ()
    stores_all: ClassVar[bool] = False
    replaces_base: ClassVar[bool] = False
    cannot_merge: ClassVar[str | None] = None

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Called with the run's tokenizer before a fresh adapter is injected."""

    def look_at_inputs(self, model: PreTrainedModel, batches: SomeBatches) -> None:
        """Called with the base, as `inject` will find it, before a fresh adapter is injected."""

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

    @classmethod
    def read_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
        """The stored tensors in the shapes that fresh layers have; AdapterError names what does not fit together."""
        return tensors

    @classmethod
    def write_tensors(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trained tensors by the names that PEFT has for them, from those by `stored_name` below PEFT's usual prefix;
        `read_tensors` is its inverse."""
        return tensors

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the trained parameter `name` is multiplied with."""
        return 1.0

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """Added to the loss of each step, scalar."""
        return None

    def after_step(
        self, model: PreTrainedModel, step: int, total_steps: int, lr: float, clip_factor: float = 1.0
    ) -> None:
        """Called after each optimizer step (1 to `total_steps`), with the gradients still there, unclipped.

        Args:
            clip_factor: what the optimizer multiplied the gradients with, so that their norm kept to its limit.
        """

    def resize(
        self, model: PreTrainedModel, step: int, total_steps: int, gain: Gain = plain_size
    ) -> dict[str, nn.Parameter]:
        """Gives the trained weights the shapes that they have after `step`. Returns those that changed, by name.

        Called after each optimizer step, and before a checkpoint is filled in. What old and new shape share lies at
        the start of each dimension.

        Args:
            gain: says how much larger than an untrained adapter's new random weights are.
        """
        return {}

    def ships_from(self, total_steps: int) -> int:
        """The first step whose adapter may be published as the best one."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside weights and optimizer."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""

    def write_beside(self, folder: Path) -> None:
        """Writes into an adapter's folder what `inject` needs, beside settings and weights, to make the same base."""

    def read_beside(self, folder: Path) -> None:
        """Reads what `write_beside` wrote; called before the adapter in `folder` is injected."""

    def publish(self, checkpoint: Path, target: Path) -> None:
        """Writes the adapter that ships into the empty folder `target`, from the adapter of a checkpoint."""
        for file in sorted(checkpoint.iterdir()):
            (target / file.name).write_bytes(file.read_bytes())

    @classmethod
    def layer_of(cls, key: str) -> str | None:
        """The layer whose own weight is stored as `key` (without PEFT's prefix); None for what is no layer's."""
        found = (name for name in cls.stored_as.values() if key.endswith(f".{name}"))
        return next((key.removesuffix(f".{name}") for name in found), None)

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
