"""The moments of a run at which most memory is held, each with what is held then."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.plan.base import Component
from qlora_kit.plan.decoder_layer import GRADIENTS, Batch
from qlora_kit.plan.layer_shape import layer_shapes
from qlora_kit.plan.overhead import FRAMEWORK_BYTES, OVERHEAD
from qlora_kit.plan.shapes import Linear, ModelShapes
from qlora_kit.plan.step import evaluation_tape, training_tape
from qlora_kit.plan.stored import BYTES, Device
from qlora_kit.recipe import Recipe

SAVED = ("adapter", "low bits of bf16 weights", "optimizer states")
UPDATE_BYTES = 16  # a weight, its gradient and what comes of both, in fp32, one trained tensor at a time
SOFT_CAPPED = ("gemma2",)  # heads that change their logits: all of them are made at once


@dataclass(frozen=True)
class Moment:
    """What is held at one moment: part to bytes."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def moments(
    recipe: Recipe,
    architecture: str,
    shapes: ModelShapes,
    targets: list[Linear],
    stored: list[Component],
    largest: int,
    device: Device,
) -> list[Moment]:
    """Training step, evaluation, update and checkpoint, in this order.

    Args:
        stored: what is held throughout, and the gradients.
        largest: weights of the largest trained tensor.
    """
    held = {part.name: part.bytes for part in stored if not part.mapped and part.bytes}
    if device == "cpu":
        held[OVERHEAD] = FRAMEWORK_BYTES
    gradients = held.pop(GRADIENTS, 0)
    layers = layer_shapes(shapes, targets, recipe.adapter)
    batch = train_batch(recipe)
    by_layers = sum(p.trained for layer in layers for p in layer.projections) * batch.gradient_width
    at_once = gradients if recipe.train.grad_accum_steps > 1 else max(0, gradients - by_layers)
    during = batch if recipe.train.grad_accum_steps == 1 else _replace_gradients(batch)
    whole = architecture in SOFT_CAPPED or recipe.train.distill is not None
    again = recipe.train.gradient_checkpointing
    offloaded = again == "offload" and device == "cuda"
    step = training_tape(held | {GRADIENTS: at_once}, shapes, layers, during, bool(again), whole, offloaded)
    scored = _batch(recipe, recipe.eval.batch_size, 0)
    evaluation = evaluation_tape(held, shapes, layers, scored)
    copies = sum(held.get(name, 0) for name in SAVED)
    return [
        Moment("training step", step.peak),
        Moment("evaluation", evaluation.peak),
        Moment("update", held | {GRADIENTS: gradients, "one weight updated": UPDATE_BYTES * largest}),
        Moment("checkpoint", held | {"copies while saving": copies}),
    ]


def train_batch(recipe: Recipe) -> Batch:
    """The largest micro batch that the recipe allows: a whole row of max_seq_len, the others shorter."""
    full = 4 if recipe.train.grad_accum_steps > 1 else BYTES[recipe.adapter.dtype]
    return _batch(recipe, recipe.train.micro_batch_size, full)


def _batch(recipe: Recipe, rows: int, gradient_width: int) -> Batch:
    return Batch(
        rows=rows,
        length=recipe.data.max_seq_len,
        width=BYTES[recipe.base.compute_dtype],
        dropout=bool(gradient_width and getattr(recipe.adapter, "dropout", 0)),
        quant=recipe.base.quant,
        gradient_width=gradient_width,
        head_quant=recipe.base.head_quant,
    )


def _replace_gradients(batch: Batch) -> Batch:
    """Gradients of earlier micro batches are there already."""
    return Batch(**{**batch.__dict__, "gradient_width": 0})
