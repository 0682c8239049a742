"""The fused DoRA layer against its reference and plain autograd: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.dora_linear import dora_linear, dora_linear_reference, row_norms

SHAPES = [  # x's leading shape, in, out, rank
    ((1,), 1, 1, 1),
    ((7,), 13, 11, 3),
    ((2, 3, 5), 17, 31, 16),
    ((1, 64), 96, 33, 8),
    ((), 6, 9, 2),
    ((0,), 6, 5, 2),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
SCALING = 1.7


class Case:
    """Random inputs of one layer; `leaves` in the order x, a, b, magnitude, bias."""

    def __init__(self, lead: tuple[int, ...], fan_in: int, fan_out: int, rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)

        def draw(*shape: int, of: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

        wide = torch.float32  # adapters stay wide under narrow compute
        self.weight = draw(fan_out, fan_in, of=dtype)
        self.x = draw(*lead, fan_in, of=dtype).requires_grad_()
        self.a = (draw(rank, fan_in, of=wide) / fan_in**0.5).requires_grad_()
        self.b = (draw(fan_out, rank, of=wide) / rank**0.5).requires_grad_()
        self.magnitude = draw(fan_out, of=wide).abs().add_(0.5).requires_grad_()
        self.bias = draw(fan_out, of=wide).requires_grad_()
        self.grad_y = draw(*lead, fan_out, of=dtype)
        self.row_squares = self.weight.to(wide).square().sum(1)

    def expand(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.a, self.b, self.magnitude, self.bias)

    def fused(self) -> Tensor:
        weights = (self.a, self.b, self.magnitude)
        return dora_linear(self.x, self.expand, self.bias, *weights, self.row_squares, SCALING)

    def reference(self) -> Tensor:
        return dora_linear_reference(self.x, self.expand, self.bias, self.a, self.b, self.magnitude, SCALING)

    def plain(self) -> Tensor:
        """Nothing of ours: the merged weight in float64, its norm without a gradient."""
        whole = self.weight.double() + SCALING * (self.b.double() @ self.a.double())
        whole = (self.magnitude.double() / whole.norm(dim=1).detach())[:, None] * whole
        return F.linear(self.x.double(), whole, self.bias.double())

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.grad_y.to(y.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    case = Case(*shape, dtype)
    wanted = (case.plain(), *case.gradients(case.plain()))
    for y in (case.fused(), case.reference()):
        assert y.dtype == dtype
        for one, other in zip((y, *case.gradients(y)), wanted, strict=True):
            scale = max([1.0, *other.detach().abs().flatten().tolist()])
            torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_norms_without_the_whole_matrix():
    case = Case((3,), 96, 33, 8, torch.float32)
    whole = case.weight + SCALING * (case.b @ case.a)
    found = row_norms(case.weight, case.a, case.b, case.row_squares, SCALING)
    torch.testing.assert_close(found, whole.norm(dim=1), rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_finite():
    case = Case((3,), 6, 5, 2, torch.float32)
    case.weight.zero_()
    case.row_squares.zero_()
    case.b.data.zero_()
    for y in (case.fused(), case.reference()):
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(gradient).all() for gradient in case.gradients(y))


def test_no_bias_and_a_frozen_input():
    case = Case((7,), 13, 11, 3, torch.float32)
    y = dora_linear(case.x.detach(), case.expand, None, case.a, case.b, case.magnitude, case.row_squares, SCALING)
    torch.testing.assert_close(y, case.fused() - case.bias, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert case.a.grad is not None and case.magnitude.grad is not None
