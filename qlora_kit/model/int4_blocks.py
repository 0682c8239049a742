"""Weights in the 4-bit layout of onnxruntime's MatMulNBits: what is trained on is what ships.

The operator (com.microsoft.MatMulNBits, bits=4, onnxruntime's ContribOperators page) reads a weight [out, in] as
blocks of 32, 64 or 128 along `in`; the last one of a row may be partly filled. An element is scale · (code - zero
point), codes and zero points 0 to 15. Zero points are integers because its fast kernels take no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZES = (32, 64, 128)
Algorithm = Literal["rtn", "hqq"]
_TOP = 15  # the largest code
_AT_ONCE = 2**18  # weights expanded or quantized together: their intermediates stay in the processor's cache


@dataclass(frozen=True)
class Int4Grid:
    """How a weight is brought into blocks."""

    block_size: int = 32
    """Elements that share a scale and a zero point: 32, 64 or 128."""
    algorithm: Algorithm = "hqq"
    """`rtn` rounds to the nearest of 16 levels between a block's extremes (and zero); `hqq` then moves the levels
    together, so that small errors become smaller at the cost of outliers (see `_half_quadratic`)."""


INT4_GRID = Int4Grid()


class Int4Blocks(NamedTuple):
    """A weight as MatMulNBits takes it: its inputs B, scales and zero_points."""

    codes: Tensor
    """uint8 [out, blocks, block_size / 2], the even element in the low four bits."""
    scales: Tensor
    """float32 [out, blocks]."""
    zero_points: Tensor
    """uint8 [out, ceil(blocks / 2)], the even block in the low four bits."""


@torch.no_grad()
def quantize_int4(weight: Tensor, grid: Int4Grid) -> Int4Blocks:
    """The codes of a weight [out, in] of any float dtype, on its device, computed in fp32."""
    parts = []
    for rows in weight.split(_rows_at_once(weight.shape[1])):
        blocks = as_blocks(rows.float().contiguous(), grid.block_size)
        scales, zeros = _spanned(blocks)
        if grid.algorithm == "hqq":
            scales = _half_quadratic(blocks, scales, zeros)
        codes = _nearest_codes(blocks, scales, zeros)
        parts.append(Int4Blocks(pack_4bit(codes), scales.squeeze(2), pack_4bit(zeros.squeeze(2))))
    return Int4Blocks(*(torch.cat(tensors) for tensors in zip(*parts)))


def dequantize_int4(blocks: Int4Blocks, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], each element computed in fp32 and rounded once to `dtype`."""
    out_features, count, half = blocks.codes.shape
    weight = torch.empty(out_features, count, 2 * half, dtype=dtype, device=blocks.codes.device)
    zeros = _unpacked(blocks.zero_points)[:, :count]
    size = _rows_at_once(in_features)
    for first in range(0, out_features, size):
        rows = slice(first, first + size)
        levels = _unpacked(blocks.codes[rows]).view(torch.int8) - zeros[rows].view(torch.int8)[..., None]
        torch.mul(levels.float(), blocks.scales[rows][..., None], out=weight[rows])
    return weight.view(out_features, -1)[:, :in_features].contiguous()


def as_blocks(weight: Tensor, block_size: int) -> Tensor:
    """[out, in] to [out, blocks, block_size], filled up with zeros, which are among the levels of every block."""
    return F.pad(weight, (0, -weight.shape[1] % block_size)).view(weight.shape[0], -1, block_size)


def _spanned(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and integer zero points [out, blocks, 1] whose 16 levels reach from each block's least to its largest."""
    low, high = blocks.amin(2, keepdim=True).clamp_max(0), blocks.amax(2, keepdim=True).clamp_min(0)
    scales = (high - low) / _TOP
    scales = torch.where(scales > 0, scales, 1.0)
    return scales, (-low / scales).round().clamp(0, _TOP)


def _nearest_codes(blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (blocks / scales + zeros).round().clamp(0, _TOP)


def _half_quadratic(blocks: Tensor, scales: Tensor, zeros: Tensor, rounds: int = 10) -> Tensor:
    """Scales [out, blocks, 1] that make the sum of |error|^p less, p = 0.7 (HQQ, Badri & Shaji 2023, equations 3 to 5).

    As there, the outliers E of the error are split off by a shrinking step and what is left is a least-squares problem;
    here it is solved for the scale, since rounding a zero point to an integer undoes its steps. Errors are measured in
    steps of the grid, which makes one β fit every model. Of all rounds a block keeps the best: none gets worse.
    """
    p, beta = 0.7, 10.0
    units, stretch = blocks / scales, torch.ones_like(scales)
    best, least = stretch, torch.full_like(scales, torch.inf)
    for _ in range(rounds + 1):
        levels = _nearest_codes(units, stretch, zeros) - zeros
        error = units - stretch * levels
        size = error.abs()
        powers = size.clamp_min(1e-6).pow(p - 1)
        cost = (size * powers).sum(2, keepdim=True)
        best, least = torch.where(cost < least, stretch, best), torch.minimum(cost, least)
        outliers = error.sign() * (size - powers / beta).clamp_min(0)
        squares = levels.square().sum(2, keepdim=True)
        fitted = ((units - outliers) * levels).sum(2, keepdim=True) / squares
        stretch = torch.where((squares > 0) & (fitted > 0), fitted, stretch)
        beta *= 1.01
    return scales * best


def _rows_at_once(in_features: int) -> int:
    return max(1, _AT_ONCE // in_features)


def pack_4bit(values: Tensor) -> Tensor:
    """uint8 [..., ceil(n / 2)] of integers 0 to 15 [..., n], the even one in the low four bits."""
    pairs = F.pad(values, (0, values.shape[-1] % 2)).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpacked(packed: Tensor) -> Tensor:
    """uint8 [..., 2 n] of what `pack_4bit` made [..., n]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
