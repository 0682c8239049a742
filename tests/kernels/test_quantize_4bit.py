"""4-bit codes: the fast path against the reference and against bitsandbytes itself, byte for byte."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from qlora_kit.kernels.quantize_4bit import NUMBERS_AT_ONCE, quantize_4bit, quantize_4bit_reference
from qlora_kit.model.quantized import bnb

SHAPES = [(1,), (2,), (63,), (64,), (65,), (3, 77), (128, 64), (NUMBERS_AT_ONCE // 512 + 1, 515)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def code_of(kind: str) -> torch.Tensor:
    return bnb.functional.get_4bit_type(kind, "cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 4096])
def test_it_is_the_reference(kind: str, dtype: torch.dtype, shape: tuple[int, ...], block_size: int) -> None:
    weight = weights(shape, dtype)
    found, expected = (path(weight, block_size, code_of(kind)) for path in (quantize_4bit, quantize_4bit_reference))
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_at_borders_and_beside_them(kind: str) -> None:
    """Where one bit decides; with 1 in each block, nothing is rescaled."""
    code = code_of(kind)
    sorted_code = code.sort().values
    borders = (sorted_code[:-1] + sorted_code[1:]) / 2
    near = torch.cat([borders, sorted_code, torch.tensor([-1.0, -0.0, 0.0])])
    one = torch.ones_like(near)
    numbers = torch.cat([near, near.nextafter(one), near.nextafter(-one), -near]).clamp(-1, 1)
    rows = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 63)]).view(-1, 63)
    weight = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    for found, expected in zip(quantize_4bit(weight, 64, code), quantize_4bit_reference(weight, 64, code)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("odd", [0.0, -0.0, 1e-40, 3e38, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("length", [128, 150, 151])
def test_odd_numbers(odd: float, length: int) -> None:
    weight = weights((length,), torch.float32)
    weight[:64] = odd
    weight[-3:] = odd
    (codes, absmax), (plain, plain_absmax) = (
        path(weight, 64, code_of("nf4")) for path in (quantize_4bit, quantize_4bit_reference)
    )
    assert torch.equal(codes, plain)
    torch.testing.assert_close(absmax, plain_absmax, rtol=0, atol=0, equal_nan=True)


CASES = """
import hashlib, sys, torch
FRESH
digest = hashlib.sha256()
for kind in ("nf4", "fp4"):
    for storage in (torch.uint8, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for count in (64, 1000, 2**17 + 3 * 64, *((65, 127) if storage == torch.uint8 else ())):
                weight = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.02).to(dtype)
                codes, state = bnb.functional.quantize_4bit(weight, quant_type=kind, quant_storage=storage)
                digest.update(str((codes.shape, codes.dtype, state.absmax.shape)).encode())
                digest.update(codes.view(torch.uint8).numpy().tobytes() + state.absmax.numpy().tobytes())
print(digest.hexdigest())
"""


def test_bitsandbytes_alone_gives_the_same_bytes() -> None:
    """Through its own functions, in a process that never saw ours."""
    imports = ("import bitsandbytes as bnb", "from qlora_kit.model.quantized import bnb")
    outputs = [
        subprocess.run(
            [sys.executable, "-c", CASES.replace("FRESH", line)], check=True, capture_output=True, text=True
        ).stdout
        for line in imports
    ]
    assert outputs[0] == outputs[1] and len(outputs[0].strip()) == hashlib.sha256().digest_size * 2


def test_it_is_what_quantizes_on_a_cpu() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")
