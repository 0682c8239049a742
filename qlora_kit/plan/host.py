"""What a run on a GPU keeps in the host's memory, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_kit.plan.base import Component
from qlora_kit.plan.moments import train_batch
from qlora_kit.plan.shapes import ModelShapes
from qlora_kit.plan.stored import BYTES, Device
from qlora_kit.recipe import Recipe

PIECE_BYTES = 2**22  # kernels/offloaded_inputs.py


def host_parts(recipe: Recipe, shapes: ModelShapes, device: Device, in_files: bool = False) -> Iterable[Component]:
    """By the recipe's own choice; nothing on a CPU, whose memory is the host's.

    `in_files`: the checkpoint's files hold the embedding as it is used, and it stays mapped to them.
    """
    if device == "cpu":
        return
    if recipe.base.embeddings == "host":
        size = next(iter(shapes.embeddings.values())) * BYTES[recipe.base.compute_dtype]
        yield Component("embeddings", size, True, recipe.base.compute_dtype, in_files)
    if recipe.train.gradient_checkpointing == "offload":
        batch = train_batch(recipe)
        pieces = -(-batch.tokens * batch.width * shapes.hidden // PIECE_BYTES)
        yield Component(
            "layer inputs", shapes.layers * pieces * PIECE_BYTES, True, "pinned: train.gradient_checkpointing"
        )
