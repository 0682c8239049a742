"""Bytes in which weights (bitsandbytes', int4) and optimizer states are stored."""

from __future__ import annotations

from typing import Literal

from qlora_kit.recipe import BaseSection

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
Device = Literal["cuda", "cpu"]

# bitsandbytes 0.50: blocks of 64 weights; with double quantization blocks of 256 statistics.
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_4BIT, _CODE_8BIT, _OFFSET = 16 * 4, 256 * 4, 4
# bitsandbytes' 8-bit optimizers: blocks of 256, two code books a tensor, fp32 states below 4096 weights.
_OPTIMIZER_BLOCK, _MIN_8BIT = 256, 4096


def stored_bytes(weights: int, rows: int, base: BaseSection) -> int:
    """Bytes in which one linear weight is stored: codes and all statistics.

    Args:
        weights: numbers in the weight.
        rows: output features; int8 keeps one fp32 statistic a row (Dettmers et al. 2022).
        base: its `quant`, `double_quant` (Dettmers et al. 2023, section 3) and `block_size` (model/int4_blocks.py).
    """
    if base.quant == "none":
        return weights * BYTES[base.compute_dtype]
    if base.quant == "int8":
        return weights + 4 * rows
    if base.quant == "int4":
        a_row = _ceil(weights // rows, base.block_size)
        return rows * (a_row * base.block_size // 2 + 4 * a_row + _ceil(a_row, 2))
    blocks = _ceil(weights, _BLOCK)
    statistics = 4 * blocks
    if base.double_quant:
        statistics = blocks + 4 * _ceil(blocks, _NESTED_BLOCK) + _CODE_8BIT + _OFFSET
    return _ceil(weights, 2) + statistics + _CODE_4BIT


def optimizer_bytes(weights: int, kind: str, device: Device) -> int:
    """Bytes of AdamW's two states of one trained tensor; an 8-bit kind on a CPU falls back to fp32 states."""
    if "8bit" not in kind or device == "cpu" or weights < _MIN_8BIT:
        return 8 * weights
    return 2 * (weights + 4 * _ceil(weights, _OPTIMIZER_BLOCK) + _CODE_8BIT)


def _ceil(total: int, size: int) -> int:
    return -(-total // size)
