"""The fused layer with gates against its reference and plain autograd: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.gated_linear import gated_linear, gated_linear_reference

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
    """Random inputs of one layer, the last gate closed; `leaves` in the order x, a, gates, b, bias."""

    def __init__(self, lead: tuple[int, ...], fan_in: int, fan_out: int, rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)

        def draw(*shape: int, of: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

        wide = torch.float32  # adapters stay wide under narrow compute
        self.weight = draw(fan_out, fan_in, of=dtype)
        self.x = draw(*lead, fan_in, of=dtype).requires_grad_()
        self.a = (draw(rank, fan_in, of=wide) / fan_in**0.5).requires_grad_()
        gates = draw(rank, of=wide)
        gates[-1] = 0.0
        self.gates = gates.requires_grad_()
        self.b = (draw(fan_out, rank, of=wide) / rank**0.5).requires_grad_()
        self.bias = draw(fan_out, of=wide).requires_grad_()
        self.grad_y = draw(*lead, fan_out, of=dtype)

    def expand(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.a, self.gates, self.b, self.bias)

    def fused(self) -> Tensor:
        return gated_linear(self.x, self.expand, self.bias, self.a, self.gates, self.b, SCALING)

    def reference(self) -> Tensor:
        return gated_linear_reference(self.x, self.expand, self.bias, self.a, self.gates, self.b, SCALING)

    def plain(self) -> Tensor:
        """Nothing of ours: the merged weight in float64."""
        delta = self.b.double() @ self.gates.double().diag() @ self.a.double()
        return F.linear(self.x.double(), self.weight.double() + SCALING * delta, self.bias.double())

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


def test_bf16_weights_keep_their_dtype_in_gradients():
    case = Case((7,), 13, 11, 3, torch.bfloat16)
    a, b = (weight.detach().bfloat16().requires_grad_() for weight in (case.a, case.b))
    gated_linear(case.x, case.expand, None, a, case.gates, b, SCALING).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16 and case.gates.grad.dtype == torch.float32
