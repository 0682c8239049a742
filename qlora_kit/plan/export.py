"""What `qlora-kit export` takes on disk, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.plan.base import Component
from qlora_kit.plan.shapes import ModelShapes
from qlora_kit.recipe import Recipe

LINEAR_BITS = {"fp32": 32, "int8": 8.5, "int4": 5.0, "nf4": 4.5, "int4_exact": 5.2, "int4_fast": 5.2}
"""Bits of a linear layer's weight with its share of scale and zero point (export/forms.py)."""
BESIDE_CODES = ("nf4", "int4_exact", "int4_fast")
"""Profiles that hold the adapter beside the codes."""
CODED_VOCABULARY = ("int8", "int4", "int4_fast")
"""Profiles whose embedding and head are 8-bit codes, where the width is a multiple of their block size."""
CODE_BLOCK = 32
CANNOT_MERGE = ("bottleneck", "prompt_tuning")
"""Methods without a merged model."""


def planned_export(shapes: ModelShapes, recipe: Recipe, adapter: int) -> list[Component]:
    """Of a recipe whose rows of the proof are all as long as may be; `adapter`: its weights."""
    if recipe.adapter.method in CANNOT_MERGE:
        return []
    linear = sum(layer.weights for layer in shapes.linears)
    tokens = recipe.export.verify_prompts * recipe.data.max_seq_len
    merged = "fp32" if recipe.export.merged else "fp32; removed at the end"
    return export_parts(linear, shapes.vocab, shapes.hidden, adapter, recipe.export.profiles, tokens, merged=merged)


def export_parts(
    linear: int,
    vocab: int,
    width: int,
    adapter: int,
    profiles: Sequence[str],
    tokens: int,
    may_code: bool = True,
    merged: str = "fp32",
) -> list[Component]:
    """Merged folder, bundles, and the trained model's answers that they are held to, at most.

    Args:
        linear: weights of linear layers but the head. Embedding and head, `vocab` times `width` each, are counted
            both; the rest is small.
        adapter: its weights.
        tokens: of the rows of the proof.
        may_code: whether the vocabulary's matrices may be codes; in tasks that do not generate they are not.
        merged: what is said of the merged folder.
    """
    others, may_code = 2 * vocab * width, may_code and width % CODE_BLOCK == 0
    parts = [Component("merged model", 4 * (linear + others), False, merged)]
    for profile in profiles:
        bits = LINEAR_BITS["int8"] if may_code and profile in CODED_VOCABULARY else 32
        beside = 4 * adapter if profile in BESIDE_CODES else 0
        size = int(linear * LINEAR_BITS[profile] + others * bits) // 8 + beside
        parts.append(Component(f"bundle {profile}", size, False, f"{LINEAR_BITS[profile]:g} bits a linear weight"))
    return [*parts, Component("answers for the proof", 4 * tokens * vocab, False, "removed at the end")]
