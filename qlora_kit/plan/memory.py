"""Where the memory of a run goes, in bytes: what is stored, and what comes on top at each moment of the run.

Counted is what the run adds to a process that has imported its libraries: Python with them (about 0.35 GB of host
memory) and CUDA's own context (about half a GB) come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.adapters.settings import AdapterSettings, LoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.plan.base import Component, base_parts, loading_parts, teacher_parts
from qlora_kit.plan.export import planned_export
from qlora_kit.plan.host import host_parts
from qlora_kit.plan.moments import Moment, moments
from qlora_kit.plan.shapes import Linear, ModelShapes, model_shapes
from qlora_kit.plan.stored import BYTES, Device, optimizer_bytes
from qlora_kit.plan.time import flops_per_token
from qlora_kit.plan.trained import (
    find_targets,
    parameters_saved,
    refuse_host_embedding,
    refuse_trained_head,
    trained_biases,
)
from qlora_kit.recipe import Recipe, TrainSection

Tensor = tuple[int, str]
"""Size and dtype of a trained tensor."""


@dataclass(frozen=True)
class Plan:
    """What a run needs on the device it trains on.

    Attributes:
        base_parameters: weights of the base model, a tied head counted once.
        adapter_parameters: weights that the adapter adds.
        trainable_parameters: these, and modules and biases trained in full.
        targets: names of the linear layers that get an adapter.
        components: what is stored throughout, and gradients.
        moments: what is held at each moment at which most is, part by part.
        loading: what is there at once before the first step, where the base is loaded whole; none of it stays.
        host: what a run on a GPU keeps in the host's memory instead of there.
        export: what the export of the recipe's profiles takes on disk, at most.
        flops_per_token: floating-point operations of a training step for each token of it.
    """

    model: str
    architecture: str
    device: Device
    base_parameters: int
    adapter_parameters: int
    trainable_parameters: int
    targets: list[str]
    components: list[Component]
    moments: list[Moment]
    loading: list[Component]
    host: list[Component]
    export: list[Component]
    flops_per_token: float

    @property
    def exact_bytes(self) -> int:
        """Weights, adapter, gradients and optimizer states, in memory of the run's own."""
        return sum(part.bytes for part in self.components if not part.mapped)

    @property
    def mapped_bytes(self) -> int:
        """Weights that stay mapped to the checkpoint's files: pages that the system may drop and read again."""
        return sum(part.bytes for part in self.components if part.mapped)

    @property
    def highest(self) -> Moment:
        """The moment of training at which most is held."""
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def beside(self) -> dict[str, int]:
        """What comes and goes: parts of the highest moment that are not stored."""
        stored = {part.name for part in self.components}
        return {name: size for name, size in self.highest.parts.items() if name not in stored}

    @property
    def in_use_bytes(self) -> int:
        return sum(self.beside.values())

    @property
    def training_bytes(self) -> int:
        return self.highest.bytes

    @property
    def loading_bytes(self) -> int:
        """Before the first step, where the base is loaded whole; else 0."""
        return sum(part.bytes for part in self.loading)

    @property
    def host_bytes(self) -> int:
        """In the host's memory, of its own."""
        return sum(part.bytes for part in self.host if not part.mapped)

    @property
    def export_bytes(self) -> int:
        """On disk, at most."""
        return sum(part.bytes for part in self.export)

    @property
    def total_bytes(self) -> int:
        """Of training, or of loading where that takes more."""
        return max(self.training_bytes, self.loading_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, totals included."""
        totals = ("exact", "mapped", "in_use", "training", "loading", "host", "export", "total")
        return asdict(self) | {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in totals}


def plan(recipe: Recipe, config: dict[str, Any], device: Device = "cuda", stored: str | None = None) -> Plan:
    """The memory of a run from its recipe and the base model's config.json; loads nothing.

    Args:
        config: as in config.json of a Hugging Face model, see `find_config`.
        device: where it trains; 8-bit and paged optimizers exist on CUDA only.
        stored: dtype of the checkpoint's tensors, see `stored_dtype`; None counts all of them as copied.

    Raises:
        ModelError: the architecture is unknown or the config incomplete, or a tied embedding is to be on the host.
        AdapterError: target_modules, modules_to_save or a layer's own rank or alpha match nothing, or both of the
            former one layer; or nothing would be trained; or base.head_quant, base.embeddings are of what is.
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
    trained = {f"{target.name}.weight" for target in targets} | saved.keys()
    if recipe.base.head_quant != "none":
        refuse_trained_head(shapes, trained)
    if recipe.base.embeddings == "host":
        refuse_host_embedding(shapes, trained)
    adapter.check_layers([linear.name for linear in targets])
    added = adapter_tensors(targets, shapes.hidden, adapter)
    weights = sum(size for size, _ in added)
    in_full = saved | trained_biases(parameters, targets, getattr(adapter, "bias", "none"))
    if not added and not in_full:  # biases alone, of a model that has none
        raise AdapterError(
            f"adapter.method {adapter.method}: nothing would be trained, as this {config['model_type']} model has no "
            "biases",
            fix="Take a method that adds weights of its own: lora, dora, bottleneck, prompt_tuning",
        )
    new_rows = len(adapter.new_tokens) * shapes.hidden
    in_full = {name: size + (new_rows if _is_vocabulary(name, shapes) else 0) for name, size in in_full.items()}
    mapped = device == "cpu" and stored == recipe.base.compute_dtype
    components = [
        *base_parts(shapes, parameters, recipe.base, in_full, saved, shapes.head in targets, mapped, device),
        *_training(added, list(in_full.values()), recipe, device),
        *_kept_by_method(targets, adapter),
        *teacher_parts(shapes, parameters, recipe),
    ]
    largest = max(in_full.values(), default=max((size for size, _ in added), default=0))
    return Plan(
        model=recipe.base.model,
        architecture=config["model_type"],
        device=device,
        base_parameters=sum(parameters.values()),
        adapter_parameters=weights,
        trainable_parameters=weights + sum(in_full.values()),
        targets=[linear.name for linear in targets],
        components=components,
        moments=moments(recipe, config["model_type"], shapes, targets, components, largest, device),
        loading=list(loading_parts(parameters, targets, recipe)),
        host=list(host_parts(recipe, shapes, device, stored == recipe.base.compute_dtype)),
        export=planned_export(shapes, recipe, weights),
        flops_per_token=flops_per_token(shapes, weights, recipe),
    )


def adapter_tensors(targets: list[Linear], hidden: int, adapter: AdapterSettings) -> list[Tensor]:
    """What the method adds to the layers that it adapts and to a model of width `hidden`."""
    tensors: list[Tensor] = []
    for target in targets:
        sizes = adapter.layer_sizes(target.name, target.in_features, target.out_features)
        in_dtype = len(sizes) - adapter.fp32_tensors
        tensors += [(size, adapter.dtype if place < in_dtype else "fp32") for place, size in enumerate(sizes)]
    return tensors + [(size, adapter.dtype) for size in adapter.model_sizes(hidden)]


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


def _optimizer_note(train: TrainSection, device: Device) -> str:
    if device == "cpu" and train.optimizer != "adamw":
        return f"torch AdamW, fp32 ({train.optimizer} needs CUDA)"
    return train.optimizer + (", may move to host memory" if train.optimizer.startswith("paged") else "")


def _is_vocabulary(name: str, shapes: ModelShapes) -> bool:
    return name in (next(iter(shapes.embeddings)), f"{shapes.head.name}.weight")
