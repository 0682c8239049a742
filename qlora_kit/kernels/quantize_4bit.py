"""Weights to 4-bit codes, block by block: a plain reference, and a fast path that gives the same bytes.

What bitsandbytes' `quantize_4bit` makes on a CPU (0.50, backends/default): each block is divided by its largest
absolute value, and a number becomes the index of the nearest code. Its search, torch.bucketize, walks through the
borders between codes for each number. The fast path looks into a table of equal cells, so narrow that each holds one
border at most, and compares once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TINY = 1e-38  # a block of zeros is divided by it
NUMBERS_AT_ONCE = 1 << 18  # and what is made of them stays in a core's cache


def quantize_4bit_reference(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """The plain path. Shapes as in `quantize_4bit`."""
    borders, order = _borders(code)
    scaled, absmax = _scaled(weight.reshape(-1), block_size)
    return _packed(order[torch.bucketize(scaled, borders)].to(torch.uint8)), absmax


def quantize_4bit(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """The fast path.

    Args:
        weight: any shape, float; on the CPU.
        block_size: numbers that share a scale, in the order of memory; even. The last block may be shorter.
        code: float32 [16], from -1 to 1: what each index stands for.

    Returns: (codes uint8 [ceil(n / 2), 1], the first of each two in the high bits; absmax float32 [blocks]).
    """
    flat = weight.reshape(-1)
    count = flat.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), device=weight.device)
    step = max(1, NUMBERS_AT_ONCE // block_size) * block_size
    for start in range(0, count, step):
        part = flat[start : start + step]
        scaled, largest = _scaled(part, block_size)
        absmax[start // block_size :][: len(largest)] = largest
        if not largest.isfinite().all():
            scaled = scaled.nan_to_num(nan=1.0)  # bucketize takes nan for the largest number
        codes[start // 2 :][: (len(part) + 1) // 2] = _packed(_indices(scaled, code)).view(-1)
    return codes.unsqueeze(1), absmax


def _scaled(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(numbers from -1 to 1 or nan, of even count; absmax) of [n]."""
    flat = flat.float()
    full = len(flat) - len(flat) % block_size
    blocks, rest = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1).view(-1)
    if len(rest):
        largest = rest.abs().amax().clamp(min=TINY)
        padding = flat.new_zeros(len(rest) % 2)
        scaled = torch.cat([scaled, (rest / largest).clamp_(-1, 1), padding])
        absmax = torch.cat([absmax, largest[None]])
    return scaled, absmax


def _indices(scaled: Tensor, code: Tensor) -> Tensor:
    """uint8 [n]: the index of the code nearest to each number."""
    below, border, cells, order = _table(tuple(code.tolist()))
    cell = (scaled + 1).mul_(cells / 2).to(torch.int32)
    place = below.index_select(0, cell)
    place += scaled > border.index_select(0, cell)
    return place if order is None else order.index_select(0, place.int())


@cache
def _table(code: tuple[float, ...]) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """(borders below each cell, uint8; the border in it or infinity, float32; cells from -1 to 1; order).

    A number's cell is found by arithmetic that never falls where the number rises, so a border in a lower cell is below
    the number, one in a higher cell is not, and only one in its own cell has to be compared with it.
    """
    borders, order = _borders(torch.tensor(code, device="cpu"))
    cells = 64
    while len((places := ((borders + 1) * (cells / 2)).long()).unique()) < len(borders):
        cells *= 2
    below = (places < torch.arange(cells + 1, device="cpu")[:, None]).sum(1).to(torch.uint8)
    border = torch.full((cells + 1,), torch.inf, device="cpu")
    border[places] = borders
    in_order = torch.equal(order, torch.arange(len(order), device="cpu"))
    return below, border, cells, None if in_order else order.to(torch.uint8)


def _borders(code: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 [15] halfway between codes in rising order, int64 [16] their indices)."""
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order


def _packed(indices: Tensor) -> Tensor:
    """uint8 [n] below 16, n even, to [n / 2, 1]."""
    return ((indices[::2] << 4) | indices[1::2]).unsqueeze(1)
