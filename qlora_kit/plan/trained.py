"""What of a model is trained: the layers that get an adapter, and the parameters that are trained in full."""

from __future__ import annotations

import re

from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.plan.shapes import Linear, ModelShapes


def find_targets(shapes: ModelShapes, wanted: str | list[str], embeddings: bool = False) -> list[Linear]:
    """The layers that `adapter.target_modules` means: all-linear, a regular expression, or name endings.

    Args:
        embeddings: whether the method adapts embeddings too, of which each counts as a linear layer [vocab, hidden].

    Raises:
        AdapterError: nothing matches, a listed name matches nothing, or the expression is not valid.
    """
    if wanted == "all-linear":
        return shapes.linears
    linears = [*(_as_linear(shapes) if embeddings else []), *shapes.linears, shapes.head]
    endings = ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in linears}))
    if isinstance(wanted, str):
        try:
            found = [linear for linear in linears if re.fullmatch(wanted, linear.name)]
        except re.error as error:
            raise AdapterError(f"adapter.target_modules is no regular expression: {error}", got=wanted) from None
        if not found:
            raise AdapterError("adapter.target_modules matches no layer", got=wanted, allowed=endings)
        return found
    for entry in wanted:
        if not any(_ends_with(linear.name, entry) for linear in linears):
            raise AdapterError("adapter.target_modules matches no layer", got=entry, allowed=endings)
    return [linear for linear in linears if any(_ends_with(linear.name, entry) for entry in wanted)]


def parameters_saved(parameters: dict[str, int], shapes: ModelShapes, adapter: AdapterSettings) -> dict[str, int]:
    """Parameters below `modules_to_save` and, with `new_tokens`, of the vocabulary; a tied weight once.

    All of them where the method trains all.

    Raises:
        AdapterError: a name matches no module.
    """
    if adapter.trains_all:
        return dict(parameters)
    wanted = list(adapter.modules_to_save)
    embedding = next(iter(shapes.embeddings)).removesuffix(".weight")
    if adapter.new_tokens:
        wanted += [embedding, shapes.head.name]
    modules = {name.rsplit(".", depth)[0] for name in parameters for depth in range(1, name.count(".") + 1)}
    found: set[str] = set()
    for entry in wanted:
        matches = {module for module in modules | {shapes.head.name} if _ends_with(module, entry)}
        if not matches:
            endings = ", ".join(
                sorted({module.rsplit(".", 1)[-1] for module in modules} - {str(i) for i in range(999)})
            )
            raise AdapterError("adapter.modules_to_save matches no module", got=entry, allowed=endings)
        found |= {embedding} if shapes.tied and shapes.head.name in matches else set()
        found |= matches
    return {name: size for name, size in parameters.items() if any(name.startswith(f"{module}.") for module in found)}


def refuse_host_embedding(shapes: ModelShapes, trained: set[str]) -> None:
    """Raises an error where the device needs the embedding's weight: AdapterError because it is among those that are
    trained, ModelError because the head is tied to it."""
    name, fix = next(iter(shapes.embeddings)), "Set base.embeddings=device"
    if shapes.tied:
        raise ModelError("base.embeddings=host: the output head is tied to the embedding", fix=fix)
    if name in trained:
        raise AdapterError(f"{name} is to be trained, and base.embeddings=host keeps it off the device", fix=fix)


def refuse_trained_head(shapes: ModelShapes, trained: set[str]) -> None:
    """Raises an AdapterError where the weight of the head is among those that are trained."""
    names = [f"{shapes.head.name}.weight", *(list(shapes.embeddings)[:1] if shapes.tied else [])]
    for name in names:
        if name in trained:
            fix = "Set base.head_quant=none"
            raise AdapterError(f"{name} is to be trained, and base.head_quant holds it as codes", fix=fix)


def trained_biases(parameters: dict[str, int], targets: list[Linear], kind: str) -> dict[str, int]:
    """The base's biases that `adapter.bias` trains: none, those of the targets (lora_only), or all."""
    if kind == "all":
        return {name: size for name, size in parameters.items() if name.endswith("bias")}
    of_targets = {f"{linear.name}.bias" for linear in targets} if kind == "lora_only" else set()
    return {name: size for name, size in parameters.items() if name in of_targets}


def _as_linear(shapes: ModelShapes) -> list[Linear]:
    sizes = shapes.embeddings.items()
    return [Linear(name.removesuffix(".weight"), size // shapes.hidden, shapes.hidden) for name, size in sizes]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
