"""How much a training step computes, and how long that takes at a rate measured here."""

from __future__ import annotations

import time

from qlora_kit.plan.shapes import ModelShapes
from qlora_kit.recipe import Recipe


def flops_per_token(shapes: ModelShapes, adapter_weights: int, recipe: Recipe) -> float:
    """Floating-point operations of one token of a full row.

    A frozen weight multiplies forward and backward (2 + 2 a weight), once more where activations are recomputed; a
    trained one makes its own gradient too. Attention looks at half of the row on average.
    """
    frozen = sum(linear.weights for linear in shapes.linears) + shapes.head.weights
    attention = 2 * shapes.layers * shapes.attention_width * recipe.data.max_seq_len / 2  # scores and their sum
    again = 1 if recipe.train.gradient_checkpointing else 0
    in_layers = (frozen - shapes.head.weights + attention) * (4 + 2 * again) + 2 * attention * 1
    return in_layers + 4 * shapes.head.weights + adapter_weights * (6 + 2 * again)


def measured_flops_per_s(dtype: str, device: str, seconds: float = 1.0) -> float:
    """Rate of a matrix product [512, 2048] x [2048, 2048] in `dtype` (bf16, fp16, fp32), measured for `seconds`."""
    import torch

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    x = torch.ones(512, 2048, dtype=kinds[dtype], device=device)
    weight = torch.ones(2048, 2048, dtype=kinds[dtype], device=device)
    x @ weight  # libraries set themselves up in the first
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        x @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * 512 * 2048 * 2048 / (time.perf_counter() - started)
