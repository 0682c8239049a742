"""Puts an adapter into a model: finds the target layers, freezes the rest, marks what is trained in full."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qlora_kit.adapters.layer import LINEAR, AdaptedLayer
from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import refuse_coded_head

WrapLayer = Callable[[Any, str], AdaptedLayer]
Kinds = tuple[type[nn.Module], ...]


def find_targets(model: nn.Module, wanted: str | list[str], kinds: Kinds = LINEAR) -> list[str]:
    """Full names of the layers that `wanted` means, in the model's order.

    Args:
        wanted: `all-linear` (all linear ones but the output head), a regular expression matched against whole names,
            or a list of names or name endings.
        kinds: the layers that can be adapted.

    Raises:
        AdapterError: nothing matches, a listed name matches nothing, or the expression is not valid.
    """
    head, modules = output_head(model), dict(model.named_modules())
    if wanted == "all-linear":
        return [name for name, module in modules.items() if isinstance(module, LINEAR) and module is not head]
    known = [name for name, module in modules.items() if isinstance(module, kinds)]
    if isinstance(wanted, str):
        try:
            found = [name for name in known if re.fullmatch(wanted, name)]
        except re.error as error:
            raise AdapterError(f"adapter.target_modules is not a regular expression: {error}", got=wanted) from None
        if not found:
            raise AdapterError("adapter.target_modules matches no layer", got=wanted, allowed=_endings(known))
        return found
    what = "linear layer" if kinds == LINEAR else "layer that can be adapted"
    for entry in wanted:
        if not any(_ends_with(name, entry) for name in known):
            close = difflib.get_close_matches(entry, {name.rsplit(".", 1)[-1] for name in known}, n=1)
            hint = f"did you mean {close[0]}?" if close else ""
            raise AdapterError(
                f"adapter.target_modules matches no {what}", got=entry, allowed=_endings(known), fix=hint
            )
    return [name for name in known if any(_ends_with(name, entry) for entry in wanted)]


def inject_layers(
    model: nn.Module,
    settings: AdapterSettings,
    wrap: WrapLayer | None,
    targets: list[str] | None = None,
    kinds: Kinds = LINEAR,
) -> list[str]:
    """Freezes `model`, replaces its target layers by wrapped ones and marks `modules_to_save` trainable, in place.

    Args:
        settings: wanted_layers and bias, where the method has it, say which layers and biases are trained.
        wrap: makes the adapted layer from the frozen one and its name; None for a method without such layers.
        targets: full layer names; found from settings.target_modules when left out.
        kinds: the layers that can be adapted.

    Returns: the names of the wrapped layers.

    Raises:
        AdapterError: targets or modules_to_save name nothing or what cannot be adapted, or one layer is asked for both.
    """
    if any(adapted_layers(model)):
        raise AdapterError("the model already holds an adapter", fix="Load the base again")
    saved = expand_modules_to_save(model, settings.modules_to_save)
    if targets is None:
        targets = wanted_targets(model, settings, kinds)
    both = [name for name in targets if _inside(name, saved)]
    if both:
        raise AdapterError(
            "a layer is both a target and a module to save", got=both[0], fix="Remove it from one of them"
        )
    dtype = _float_dtype(model)  # of the base: the first of its parameters, which may be cast below
    model.requires_grad_(False)
    for name in targets:
        assert wrap is not None  # a method without it wants no layers
        if is_tied_head(model, model.get_submodule(name)):
            untie_head(model)  # the delta is the head's alone
        base: Any = model.get_submodule(name)
        refuse_coded_head(model, name, "target_modules")
        _check_kind(base, name, settings, kinds)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrap(base, name))
    for name in saved:
        _train_in_full(model, model.get_submodule(name), dtype)
    train_biases(model, getattr(settings, "bias", "none"), dtype)
    return targets


def _check_kind(layer: nn.Module, name: str, settings: AdapterSettings, kinds: Kinds) -> None:
    if not isinstance(layer, kinds):  # a stored adapter may name what another toolkit adapts
        allowed = ", ".join(sorted({kind.__name__ for kind in kinds}))
        what = f"adapter.method {settings.method} does not adapt {name}"
        raise AdapterError(what, got=type(layer).__name__, allowed=allowed, fix="Train one without this layer")


def wanted_targets(model: nn.Module, settings: AdapterSettings, kinds: Kinds = LINEAR) -> list[str]:
    """Full names of the layers that the settings mean: of all linear ones, those that are not trained in full.

    Raises:
        AdapterError: targets, modules_to_save or settings of a single layer name nothing.
    """
    targets = find_targets(model, settings.wanted_layers, kinds)
    if settings.wanted_layers == "all-linear":
        saved = expand_modules_to_save(model, settings.modules_to_save)
        targets = [name for name in targets if not _inside(name, saved)]
    settings.check_layers(targets)
    return targets


def expand_modules_to_save(model: nn.Module, names: list[str]) -> list[str]:
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
            refuse_coded_head(model, name, "modules_to_save")
            if any(isinstance(part, QuantizedLinear) for part in modules[name].modules()):
                what = f"adapter.modules_to_save: {name} is quantized"
                raise AdapterError(what, fix="Load the base with it in skip_modules")
            if not any(parameter.is_floating_point() for parameter in modules[name].parameters()):
                raise AdapterError(f"adapter.modules_to_save: {name} has no weight to train", got=entry)
        found += matches
    embedding, head = input_embedding(model), output_head(model)
    if is_tied_head(model, head):
        tied = [name for name, module in modules.items() if module is embedding or module is head]
        if set(tied) & set(found):
            found += tied
    return [name for name in modules if name in set(found)]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that is trained; a tied weight once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The wrapped layers with their full names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))


def input_embedding(model: nn.Module) -> Any:
    """The module that embeds tokens; None in a model that has none (it reads images), or does not tell."""
    if not isinstance(model, PreTrainedModel) or model.main_input_name == "pixel_values":
        return None
    return model.get_input_embeddings()


def output_head(model: nn.Module) -> Any:
    """The module that gives the logits; None in a model that has none, or does not tell."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def is_tied_head(model: nn.Module, module: nn.Module | None) -> bool:
    """Whether `module` is the output head, and its weight the embedding's."""
    if module is None or module is not output_head(model):
        return False
    weight = getattr(module, "weight", None)
    return weight is not None and weight is getattr(input_embedding(model), "weight", None)


def untie_head(model: nn.Module) -> None:
    """Gives the head a weight of its own, of the same values, in place; saved models stay untied too."""
    head, untied = output_head(model), cast(Any, model)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    untied.config.tie_word_embeddings = False
    untied.all_tied_weights_keys = {}


def train_biases(model: nn.Module, which: str, dtype: torch.dtype) -> None:
    """Marks biases trainable: none, those of targets (lora_only), or all. A recurrent layer has several."""
    for name, module in list(model.named_modules()):
        target = name.endswith(".base_layer")
        for key, bias in list(module.named_parameters(recurse=False)):
            if not key.startswith("bias") or not (which == "all" or (which == "lora_only" and target)):
                continue
            if dtype == torch.float16 and not bias.requires_grad:
                if target or isinstance(module, QuantizedLinear):
                    bias.data = bias.data.float()  # these cast their bias themselves
                else:
                    _cast_to_fp32(model, module)
            bias.requires_grad_(True)


def _train_in_full(model: nn.Module, module: nn.Module, dtype: torch.dtype) -> None:
    """Marks all of a module trainable; fp16 cannot hold updates, so there it is cast to fp32."""
    module.requires_grad_(True)
    if dtype == torch.float16:
        _cast_to_fp32(model, module)


def _cast_to_fp32(model: nn.Module, module: nn.Module) -> None:
    """Weights and arithmetic of `module` in fp32; what enters is cast up, what leaves is cast to the model's dtype."""
    dtype = _float_dtype(model)
    module.float()

    def cast_all(values: Any, dtype: Any) -> Any:
        return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)

    def cast_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return cast_all(args, torch.float32), cast_all(kwargs, torch.float32)

    module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    module.register_forward_hook(lambda _module, _args, output: cast_all(output, _leaving(model, dtype)))


def _leaving(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a transformers model now works in (merging changes it); of other models, `dtype`."""
    return cast(torch.dtype, model.config.dtype) if isinstance(model, PreTrainedModel) else dtype


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)


def _inside(name: str, outer: list[str]) -> bool:
    """Whether `name` is one of `outer`, or lies in one, or holds one."""
    return any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in outer)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _endings(names: list[str]) -> str:
    ends = {name.rsplit(".", 1)[-1] for name in names if name}
    return ", ".join(sorted(end for end in ends if not end.isdigit()))
