"""Exact halves of fp32 values, and the chunked forms against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kit.kernels import split_fp32 as split
from qlora_kit.kernels.split_fp32 import join_fp32, join_into, split_fp32, split_into

NOTABLE = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x3F800000, 0x3F808000,
           0x3F807FFF, 0x3F808001, 0xBF808000, 0x3F818000, 0x7F7F0000, 0x7F7F7FFF, 0xFF7F7FFF]  # fmt: skip


def bit_patterns() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    notable = torch.tensor([bits - 2**32 if bits >= 2**31 else bits for bits in NOTABLE])
    subnormal = torch.randint(0, 0x00800000, (20_000,), generator=generator, dtype=torch.int64)
    values = torch.cat([random, notable, subnormal]).to(torch.int32).view(torch.float32)
    return values[values.isfinite() & (values.abs() < 3.38e38)]  # above, the nearest bf16 is infinite


def test_split_and_join_are_exact_for_any_bit_pattern() -> None:
    value = bit_patterns()
    high, low = split_fp32(value)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(join_fp32(high, low).view(torch.int32), value.view(torch.int32))


def test_the_high_half_is_the_nearest_bf16() -> None:
    value = bit_patterns()
    high, _ = split_fp32(value)
    nearest = value.bfloat16()
    tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
    away = high[tie].float().abs() - value[tie].abs()
    assert (away > 0).all(), "ties go away from zero"
    assert tie.sum() >= 3


def test_split_takes_any_shape_and_stride() -> None:
    value = torch.randn(5, 7).T
    assert torch.equal(join_fp32(*split_fp32(value)), value)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (199, 1003), (0, 4)])
def test_the_chunked_forms_give_the_bits_of_the_plain_ones(
    shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(torch.tensor(shape).prod())
    monkeypatch.setattr(split, "CHUNK", max(chunk, size // 100))
    value = bit_patterns()[:size].reshape(shape)
    high, low = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    split_into(value, high, low)
    plain_high, plain_low = split_fp32(value)
    assert torch.equal(high.view(torch.int16), plain_high.view(torch.int16)) and torch.equal(low, plain_low)
    joined = torch.empty_like(value)
    join_into(joined, high, low)
    assert torch.equal(joined.view(torch.int32), value.view(torch.int32))
