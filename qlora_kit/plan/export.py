"""What `qlora-kit export` takes on disk, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def export_parts(shapes: ModelShapes, recipe: Recipe, adapter: int) -> Iterable[Component]:
    """Merged folder, bundles, and the trained model's answers that they are held to; `adapter`: its weights."""
    if recipe.adapter.method in CANNOT_MERGE:
        return
    linear = sum(layer.weights for layer in shapes.linears)
    others = 2 * shapes.vocab * shapes.hidden
    merged = "fp32" if recipe.export.merged else "fp32; removed at the end"
    yield Component("merged model", merged_bytes(linear, others), False, merged)
    for profile in recipe.export.profiles:
        size = bundle_bytes(profile, linear, others, adapter, coded=shapes.hidden % CODE_BLOCK == 0)
        yield Component(f"bundle {profile}", size, False, f"{LINEAR_BITS[profile]:g} bits a linear weight")
    tokens = recipe.export.verify_prompts * recipe.data.max_seq_len
    yield Component("answers for the proof", answers_bytes(tokens, shapes.vocab), False, "removed at the end")


def export_bytes(
    linear: int, vocab: int, width: int, adapter: int, profiles: Sequence[str], tokens: int, may_code: bool = True
) -> int:
    """All of it at most.

    Args:
        linear: weights of linear layers but the head. Embedding and head, `vocab` times `width` each, are counted
            both; the rest is small.
        adapter: its weights.
        tokens: of the rows of the proof.
        may_code: whether the vocabulary's matrices may be codes; in tasks that do not generate they are not.
    """
    others, coded = 2 * vocab * width, may_code and width % CODE_BLOCK == 0
    bundles = sum(bundle_bytes(profile, linear, others, adapter, coded) for profile in profiles)
    return merged_bytes(linear, others) + bundles + answers_bytes(tokens, vocab)


def merged_bytes(linear: int, others: int) -> int:
    """fp32."""
    return 4 * (linear + others)


def bundle_bytes(profile: str, linear: int, others: int, adapter: int, coded: bool) -> int:
    """Of one profile; `coded`: its vocabulary's matrices are codes where the profile has them so."""
    bits = LINEAR_BITS["int8"] if coded and profile in CODED_VOCABULARY else 32
    beside = 4 * adapter if profile in BESIDE_CODES else 0
    return int(linear * LINEAR_BITS[profile] + others * bits) // 8 + beside


def answers_bytes(tokens: int, vocab: int) -> int:
    """Logits in fp32, kept until the last bundle is proven."""
    return 4 * tokens * vocab
