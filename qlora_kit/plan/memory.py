"""Where the memory of a run goes, in bytes: stored tensors exactly, activations roughly.

"Exact" is what the tensors hold; allocators, CUDA's own context (about half a GB) and Python with its libraries
(about 0.7 GB of host memory) come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.adapters.settings import AdapterSettings, LoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.plan.shapes import Linear, ModelShapes, model_shapes
from qlora_kit.plan.stored import BYTES, Device, optimizer_bytes, stored_bytes
from qlora_kit.plan.trained import find_targets, parameters_saved, trained_biases
from qlora_kit.recipe import BaseSection, Recipe, TrainSection

Tensor = tuple[int, str]
"""Size and dtype of a trained tensor."""


@dataclass(frozen=True)
class Component:
    """One part of the memory. `exact` is False for estimates, which can be off by half."""

    name: str
    bytes: int
    exact: bool
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs on the device it trains on.

    Attributes:
        base_parameters: weights of the base model, a tied head counted once.
        adapter_parameters: weights that the adapter adds.
        trainable_parameters: these, and modules and biases trained in full.
        targets: names of the linear layers that get an adapter.
    """

    model: str
    architecture: str
    device: Device
    base_parameters: int
    adapter_parameters: int
    trainable_parameters: int
    targets: list[str]
    components: list[Component]

    @property
    def exact_bytes(self) -> int:
        """Weights, adapter, gradients and optimizer states."""
        return sum(part.bytes for part in self.components if part.exact)

    @property
    def rough_bytes(self) -> int:
        """Activations, logits and the weight that is expanded for the moment of use."""
        return sum(part.bytes for part in self.components if not part.exact)

    @property
    def total_bytes(self) -> int:
        return self.exact_bytes + self.rough_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, totals included."""
        totals = {"exact_bytes": self.exact_bytes, "rough_bytes": self.rough_bytes, "total_bytes": self.total_bytes}
        return asdict(self) | totals


def plan(recipe: Recipe, config: dict[str, Any], device: Device = "cuda") -> Plan:
    """The memory of a run from its recipe and the base model's config.json; loads nothing.

    Args:
        config: as in config.json of a Hugging Face model, see `find_config`.
        device: where it trains; 8-bit and paged optimizers exist on CUDA only.

    Raises:
        ModelError: the architecture is unknown or the config incomplete.
        AdapterError: target_modules, modules_to_save or a layer's own rank or alpha match nothing, or both of the
            former one layer.
    """
    shapes = model_shapes(config)
    parameters = shapes.parameters()
    adapter = recipe.adapter
    wanted = adapter.wanted_layers
    targets = find_targets(shapes, wanted, embeddings=isinstance(adapter, LoraSettings))
    saved = parameters_saved(parameters, shapes, adapter)
    if wanted == "all-linear":  # as training does: what is trained in full gets no adapter
        targets = [linear for linear in targets if f"{linear.name}.weight" not in saved]
    both = [linear.name for linear in targets if f"{linear.name}.weight" in saved]
    if both:
        raise AdapterError(
            "a layer is both a target and a module to save", got=both[0], fix="Remove it from one of them"
        )
    adapter.check_layers([linear.name for linear in targets])
    added = adapter_tensors(targets, shapes.hidden, adapter)
    weights = sum(size for size, _ in added)
    in_full = saved | trained_biases(parameters, targets, getattr(adapter, "bias", "none"))
    new_rows = len(adapter.new_tokens) * shapes.hidden
    in_full = {name: size + (new_rows if _is_vocabulary(name, shapes) else 0) for name, size in in_full.items()}
    return Plan(
        model=recipe.base.model,
        architecture=config["model_type"],
        device=device,
        base_parameters=sum(parameters.values()),
        adapter_parameters=weights,
        trainable_parameters=weights + sum(in_full.values()),
        targets=[linear.name for linear in targets],
        components=[
            *_base(shapes, parameters, recipe.base, in_full, saved),
            *_training(added, list(in_full.values()), recipe, device),
            *_kept_by_method(targets, adapter),
            *_teacher(shapes, parameters, recipe),
            *_activations(shapes, recipe),
        ],
    )


def adapter_tensors(targets: list[Linear], hidden: int, adapter: AdapterSettings) -> list[Tensor]:
    """What the method adds to the layers that it adapts and to a model of width `hidden`."""
    tensors: list[Tensor] = []
    for target in targets:
        sizes = adapter.layer_sizes(target.name, target.in_features, target.out_features)
        in_dtype = len(sizes) - adapter.fp32_tensors
        tensors += [(size, adapter.dtype if place < in_dtype else "fp32") for place, size in enumerate(sizes)]
    return tensors + [(size, adapter.dtype) for size in adapter.model_sizes(hidden)]


def _base(
    shapes: ModelShapes, parameters: dict[str, int], base: BaseSection, in_full: dict[str, int], saved: dict[str, int]
) -> Iterable[Component]:
    """The base model's own tensors; what is trained in full is trained in place, and fp16 is too coarse for that."""
    width = BYTES[base.compute_dtype]
    in_place = max(width, 4) if base.compute_dtype == "fp16" else width

    def plain(names: Iterable[str]) -> int:
        return sum(in_full[name] * in_place if name in in_full else parameters[name] * width for name in names)

    whole = [linear for linear in shapes.linears if f"{linear.name}.weight" in saved]
    packed = [linear for linear in shapes.linears if linear not in whole]
    bits = sum(stored_bytes(linear.weights, linear.out_features, base) for linear in packed)
    label = base.quant + (", double" if base.double_quant and base.quant in ("nf4", "fp4") else "")
    stored = f"{label}; {8 * bits / max(1, sum(linear.weights for linear in packed)):.2f} bits a weight"
    yield Component("linear layers", bits, True, base.compute_dtype if base.quant == "none" else stored)
    if whole:
        yield Component("linear layers trained in full", plain(f"{linear.name}.weight" for linear in whole), True)
    biases = plain(f"{linear.name}.bias" for linear in shapes.linears if linear.bias)
    yield Component("embeddings", plain(shapes.embeddings), True, base.compute_dtype)
    head = 0 if shapes.tied else plain([f"{shapes.head.name}.weight"])
    yield Component("output head", head, True, "tied to the embedding" if shapes.tied else base.compute_dtype)
    yield Component("norms and biases", plain(shapes.norms) + biases, True, base.compute_dtype)


def _training(added: list[Tensor], in_full: list[int], recipe: Recipe, device: Device) -> Iterable[Component]:
    adapter, train = recipe.adapter, recipe.train
    full_dtype = "fp32" if recipe.base.compute_dtype == "fp16" else recipe.base.compute_dtype
    tensors = added + [(size, full_dtype) for size in in_full]
    stored = sum(size * BYTES[dtype] for size, dtype in added)
    yield Component("adapter", stored, True, f"{adapter.method}, {adapter.dtype}")
    low = sum(2 * size for size, dtype in tensors if dtype == "bf16") if adapter.keep_precision else 0
    yield Component("low bits of bf16 weights", low, True, "keep_precision: exact fp32 together with the weight")
    adds_up = train.grad_accum_steps > 1  # train/adapted_model.py: add_gradients_in_fp32
    gradients = sum(size * (4 if adds_up else BYTES[dtype]) for size, dtype in tensors)
    note = "fp32: micro batches add up; one process" if adds_up else "in the weight's dtype"
    yield Component("gradients", gradients, True, note)
    states = sum(optimizer_bytes(size, train.optimizer, device) for size, _ in tensors)
    yield Component("optimizer states", states, True, _optimizer_note(train, device))


def _kept_by_method(targets: list[Linear], adapter: AdapterSettings) -> Iterable[Component]:
    sizes = [size for t in targets for size in adapter.kept_sizes(t.name, t.in_features, t.out_features)]
    if sizes:
        yield Component("kept from step to step", 4 * sum(sizes), True, f"{adapter.method}, fp32")


def _teacher(shapes: ModelShapes, parameters: dict[str, int], recipe: Recipe) -> Iterable[Component]:
    """The model that guides the training; of another than the base only its own config could tell."""
    distill = recipe.train.distill
    if distill is None:
        return
    if distill.teacher != "base":
        yield Component("teacher", 0, False, f"not counted: {distill.teacher} is not looked at")
        return
    base = recipe.base.model_copy(update={"quant": distill.quant, "double_quant": True})
    size = sum(part.bytes for part in _base(shapes, parameters, base, {}, {}))
    if distill.top_k is None:
        yield Component("teacher", size, True, f"the base in {distill.quant}")
    else:
        yield Component("teacher", 0, True, f"only before the first step: {size / 2**30:.1f} GiB beside the base")


def _optimizer_note(train: TrainSection, device: Device) -> str:
    if device == "cpu" and train.optimizer != "adamw":
        return f"torch AdamW, fp32 ({train.optimizer} needs CUDA)"
    return train.optimizer + (", may move to host memory" if train.optimizer.startswith("paged") else "")


def _activations(shapes: ModelShapes, recipe: Recipe) -> Iterable[Component]:
    """Rough: what autograd keeps for the backward pass of one micro-batch, with fused attention."""
    width, train = BYTES[recipe.base.compute_dtype], recipe.train
    tokens = train.micro_batch_size * recipe.data.max_seq_len
    first = shapes.linears[: len(shapes.linears) // shapes.layers]
    kept = sum(linear.out_features for linear in first) + shapes.attention_width + 2 * shapes.intermediate
    norms = 2 * shapes.hidden * (4 + 2 * width)  # each norm keeps its input in fp32 and both results
    layer = tokens * (kept * width + norms)
    if train.gradient_checkpointing:
        stored, note = (
            shapes.layers * tokens * shapes.hidden * width + layer,
            "checkpointed: layer inputs and one layer",
        )
    else:
        stored, note = shapes.layers * layer, "all layers, no checkpointing"
    yield Component("activations", stored, False, f"{tokens} tokens; {note}")
    logits = tokens * shapes.vocab * (2 * width + 8)
    yield Component("logits and loss", logits, False, "with gradients, and once in fp32")
    largest = max((linear.weights for linear in shapes.linears), default=0)
    expanded = 0 if recipe.base.quant == "none" else largest * (width + 4)
    yield Component("weight expanded for use", expanded, False, "one layer at a time")


def _is_vocabulary(name: str, shapes: ModelShapes) -> bool:
    return name in (next(iter(shapes.embeddings)), f"{shapes.head.name}.weight")
