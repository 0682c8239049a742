"""Puts an adapter into a model: finds the target layers, freezes the rest, marks what is trained in full."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.lora import LoraLinear, LoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.quantized import QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)


def find_targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Full names of the linear layers that `wanted` means, in the model's order.

    Args:
        wanted: `all-linear` (all but the output head), a regular expression matched against whole names,
            or a list of names or name endings.

    Raises:
        AdapterError: nothing matches, a listed name matches nothing, or the expression is not valid.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    if wanted == "all-linear":
        return [name for name in linear if model.get_submodule(name) is not head]
    if isinstance(wanted, str):
        try:
            found = [name for name in linear if re.fullmatch(wanted, name)]
        except re.error as error:
            raise AdapterError(f"adapter.target_modules is not a regular expression: {error}", got=wanted) from None
        if not found:
            raise AdapterError("adapter.target_modules matches no layer", got=wanted, allowed=_endings(linear))
        return found
    for entry in wanted:
        if not any(_ends_with(name, entry) for name in linear):
            close = difflib.get_close_matches(entry, {name.rsplit(".", 1)[-1] for name in linear}, n=1)
            hint = f"did you mean {close[0]}?" if close else ""
            raise AdapterError(
                "adapter.target_modules matches no linear layer", got=entry, allowed=_endings(linear), fix=hint
            )
    return [name for name in linear if any(_ends_with(name, entry) for entry in wanted)]


def inject_lora(model: PreTrainedModel, settings: LoraSettings, targets: list[str] | None = None) -> list[str]:
    """Freezes `model`, wraps its target layers as LoraLinear and marks `modules_to_save` trainable, in place.

    Args:
        targets: full layer names; found from settings.target_modules when left out.

    Returns: the names of the wrapped layers.

    Raises:
        AdapterError: targets or modules_to_save name nothing, or one layer is asked for both.
    """
    targets = targets if targets is not None else find_targets(model, settings.target_modules)
    saved = expand_modules_to_save(model, settings.modules_to_save)
    both = sorted(set(targets) & set(saved))
    if both:
        raise AdapterError(
            "a layer is both a target and a module to save", got=both[0], fix="Remove it from one of them"
        )
    model.requires_grad_(False)
    for name in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(model.get_submodule(name), settings))
    for name in saved:
        _train_in_full(model, model.get_submodule(name))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and (
            settings.bias == "all" or (settings.bias == "lora_only" and name.endswith("base_layer.bias"))
        ):
            parameter.requires_grad_(True)
    return targets


def expand_modules_to_save(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Full names of the modules that `names` (endings) mean; of a tied embedding and head, both.

    Raises:
        AdapterError: a name matches nothing, or a module without a float parameter.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for entry in names:
        matches = [name for name in modules if _ends_with(name, entry)]
        if not matches:
            raise AdapterError("adapter.modules_to_save matches no module", got=entry, allowed=_endings(list(modules)))
        for name in matches:
            if isinstance(modules[name], QuantizedLinear):
                raise AdapterError(
                    f"adapter.modules_to_save: {name} is quantized", fix="Load the base with it in skip_modules"
                )
        found += matches
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None):
        tied = [name for name, module in modules.items() if module is embedding or module is head]
        if set(tied) & set(found):
            found += tied
    return [name for name in modules if name in set(found)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that is trained; a tied weight once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The wrapped layers with their full names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def _train_in_full(model: PreTrainedModel, module: nn.Module) -> None:
    """fp16 cannot hold updates: such a module is trained in fp32, and casts at its borders."""
    module.requires_grad_(True)
    if model.dtype != torch.float16:
        return
    module.float()

    def cast_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.float() if value.is_floating_point() else value for value in inputs)

    module.register_forward_pre_hook(cast_inputs)
    module.register_forward_hook(lambda _module, _inputs, output: output.to(model.config.dtype))


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _endings(names: list[str]) -> str:
    return ", ".join(
        sorted({name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdigit()})
    )
