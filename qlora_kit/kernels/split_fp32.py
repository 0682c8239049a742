"""fp32 values kept as bf16 weights and, beside them, the low 16 bits that bf16 leaves out.

A bf16 weight has 8 significant bits and swallows updates below 1/256 of itself. With the low bits an update is made in
fp32, exactly, and the weight that the model sees is that value rounded to bf16. Kalamkar et al. 2019 (arXiv:1905.12322)
call this split-SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16  # values at once: 256 KiB, which stays in a core's cache from one pass to the next


def split_fp32(value: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to (bf16 rounded to nearest, ties away from zero; int16 distance of the bit patterns). Exact, any shape."""
    bits = value.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)  # -0x8000 .. 0x7FFF
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split_fp32`: (bf16, int16) to fp32, bit for bit."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def join_into(value: Tensor, high: Tensor, low: Tensor) -> None:
    """`join_fp32` written into `value`, fp32. All contiguous, of one shape."""
    parts = (value.view(-1).view(torch.int32), high.view(-1).view(torch.int16), low.view(-1))
    for bits, high_bits, low_bits in zip(*(part.split(CHUNK) for part in parts)):
        bits.copy_(high_bits).bitwise_left_shift_(16).add_(low_bits)


def split_into(value: Tensor, high: Tensor, low: Tensor) -> None:
    """`split_fp32` of `value`, fp32, written into `high`, bf16, and `low`, int16. All contiguous, of one shape."""
    parts = (value.view(-1).view(torch.int32), high.view(-1).view(torch.int16), low.view(-1))
    for bits, high_bits, low_bits in zip(*(part.split(CHUNK) for part in parts)):
        rounded = (bits + 0x8000).bitwise_right_shift_(16)
        high_bits.copy_(rounded)
        low_bits.copy_(rounded.bitwise_left_shift_(16).neg_().add_(bits))
