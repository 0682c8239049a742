"""The base model's bytes: while it trains, while it is loaded, and as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qlora_kit.plan.shapes import Linear, ModelShapes
from qlora_kit.plan.stored import BYTES, Device, stored_bytes
from qlora_kit.recipe import BaseSection, Recipe


@dataclass(frozen=True)
class Component:
    """One part of the memory.

    Attributes:
        exact: False for what comes and goes within a step.
        mapped: pages of the checkpoint's files, which the system may drop and read again: no memory of its own.
    """

    name: str
    bytes: int
    exact: bool
    note: str = ""
    mapped: bool = False


def base_parts(
    shapes: ModelShapes,
    parameters: dict[str, int],
    base: BaseSection,
    in_full: dict[str, int],
    saved: dict[str, int],
    untied: bool = False,
    mapped: bool = False,
    device: Device = "cpu",
) -> Iterable[Component]:
    """The base model's own tensors; what is trained in full is trained in place, and fp16 is too coarse for that.

    `mapped`: what is stored in the files as it is used is not copied from there.
    """
    width = BYTES[base.compute_dtype]
    in_place = max(width, 4) if base.compute_dtype == "fp16" else width

    def plain(names: Iterable[str]) -> int:
        return sum(in_full[name] * in_place if name in in_full else parameters[name] * width for name in names)

    whole = [linear for linear in shapes.linears if f"{linear.name}.weight" in saved]
    packed = [linear for linear in shapes.linears if linear not in whole]
    bits = sum(stored_bytes(linear.weights, linear.out_features, base) for linear in packed)
    label = base.quant + (", double" if base.double_quant and base.quant in ("nf4", "fp4") else "")
    stored = f"{label}; {8 * bits / max(1, sum(linear.weights for linear in packed)):.2f} bits a weight"
    as_it_is = base.quant == "none"
    yield Component("linear layers", bits, True, base.compute_dtype if as_it_is else stored, mapped and as_it_is)
    if whole:
        yield Component("linear layers trained in full", plain(f"{linear.name}.weight" for linear in whole), True)
    biases = plain(f"{linear.name}.bias" for linear in shapes.linears if linear.bias)
    in_files = mapped and not in_full.keys() & shapes.embeddings.keys()
    yield _embeddings(shapes, base, plain, in_files, device)
    if base.head_quant != "none":
        yield _coded_head(shapes, base)
    else:
        in_files = mapped and f"{shapes.head.name}.weight" not in in_full
        yield _head(shapes, untied, base.compute_dtype, plain, in_files)
    yield Component("norms and biases", plain(shapes.norms) + biases, True, base.compute_dtype, mapped)


def _embeddings(
    shapes: ModelShapes, base: BaseSection, plain: Callable[[Iterable[str]], int], mapped: bool, device: Device
) -> Component:
    """On the device: not one that stays on the host (plan/host.py), nor one that reads the codes of a tied head."""
    away = base.embeddings == "host" and device == "cuda"
    elsewhere = list(shapes.embeddings)[:1] if away or (base.head_quant != "none" and shapes.tied) else []
    size = plain(name for name in shapes.embeddings if name not in elsewhere)
    return Component("embeddings", size, True, "on the host" if away else base.compute_dtype, mapped)


def _head(
    shapes: ModelShapes, untied: bool, dtype: str, plain: Callable[[Iterable[str]], int], mapped: bool
) -> Component:
    """A tied head that gets an adapter is trained beside a copy of the embedding (adapters/inject.py: untie_head)."""
    name = f"{shapes.head.name}.weight"
    if not shapes.tied:
        return Component("output head", plain([name]), True, dtype, mapped)
    if not untied:
        return Component("output head", 0, True, "tied to the embedding")
    return Component("output head", shapes.head.weights * BYTES[dtype], True, "the embedding copied, for an adapter")


def _coded_head(shapes: ModelShapes, base: BaseSection) -> Component:
    """model/quantized_head.py."""
    head = shapes.head
    size = stored_bytes(head.weights, head.out_features, base.model_copy(update={"quant": base.head_quant}))
    bits = f"{base.head_quant}; {8 * size / head.weights:.2f} bits a weight"
    return Component("output head", size, True, bits + ("; the embedding reads it too" if shapes.tied else ""))


def loading_parts(parameters: dict[str, int], targets: list[Linear], recipe: Recipe) -> Iterable[Component]:
    """What adapters/svd_init.py holds at once: the base as it was loaded, and of one layer W in fp32, and W and s B A
    in float64 (adapters/factors.py: residual)."""
    if not recipe.adapter.loads_whole:
        return
    dtype = recipe.base.compute_dtype
    yield Component("base, whole", sum(parameters.values()) * BYTES[dtype], True, f"unquantized, {dtype}")
    largest = max((target.weights for target in targets), default=0)
    yield Component("one layer decomposed", 20 * largest, False, "the largest, in fp32 and float64")
    if recipe.adapter.method == "loftq" and recipe.adapter.calibration_rows:
        full = recipe.adapter.calibration == "full"
        numbers = sum(target.in_features ** (2 if full else 1) for target in targets)
        yield Component("moments of inputs", 4 * numbers, False, "at most: layers of one input share them")


def teacher_parts(shapes: ModelShapes, parameters: dict[str, int], recipe: Recipe) -> Iterable[Component]:
    """The model that guides the training; of another than the base only its own config could tell."""
    distill = recipe.train.distill
    if distill is None:
        return
    if distill.teacher != "base":
        yield Component("teacher", 0, False, f"not counted: {distill.teacher} is not looked at")
        return
    base = recipe.base.model_copy(update={"quant": distill.quant, "double_quant": True, "head_quant": "none"})
    size = sum(part.bytes for part in base_parts(shapes, parameters, base, {}, {}))
    if distill.top_k is None:
        yield Component("teacher", size, True, f"the base in {distill.quant}")
    else:
        yield Component("teacher", 0, True, f"only before the first step: {size / 2**30:.1f} GiB beside the base")
