"""The fused linear layers against their references and plain autograd: values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.frozen_linear import frozen_linear, frozen_linear_reference
from qlora_kit.kernels.lora_linear import lora_linear, lora_linear_reference

SHAPES = [  # x's leading shape, in, out, rank
    ((1,), 1, 1, 1),
    ((7,), 13, 11, 3),
    ((2, 5), 8, 16, 4),
    ((2, 3, 5), 17, 31, 16),
    ((1, 64), 96, 33, 8),
    ((), 6, 9, 2),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SCALING = 1.7


class Inputs:
    """Random inputs of one layer; `leaves` in the order x, a, b, bias."""

    def __init__(self, lead: tuple[int, ...], fan_in: int, fan_out: int, rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        wide = torch.float64 if dtype == torch.float64 else torch.float32  # adapters stay wide under narrow compute
        self.weight = (draw(fan_out, fan_in) / fan_in**0.5).to(dtype)
        self.x = draw(*lead, fan_in).to(dtype).requires_grad_()
        self.a = (draw(rank, fan_in) / fan_in**0.5).to(wide).requires_grad_()
        self.b = (draw(fan_out, rank) / rank**0.5).to(wide).requires_grad_()
        self.bias = draw(fan_out).to(wide).requires_grad_()
        self.grad_y = draw(*lead, fan_out).to(dtype)

    def expand(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def lora(self, layer=lora_linear) -> Tensor:
        return layer(self.x, self.expand, self.bias, self.a, self.b, SCALING)

    def frozen(self, layer=frozen_linear) -> Tensor:
        return layer(self.x, self.expand, self.bias)

    def plain(self, with_adapter: bool = True) -> Tensor:
        """Nothing of ours: one merged weight, in float64."""
        weight = self.weight.double()
        if with_adapter:
            weight = weight + SCALING * (self.b.double() @ self.a.double())
        return F.linear(self.x.double(), weight, self.bias.double())

    def gradients(self, y: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, self.grad_y.to(y.dtype))


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    """Each within `tolerance` of the largest entry."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        assert (one.double() - other.double()).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_values_and_gradients(shape, dtype):
    case = Inputs(*shape, dtype)
    leaves = (case.x, case.a, case.b, case.bias)
    wanted = case.gradients(case.plain(), leaves)
    for layer in (lora_linear, lora_linear_reference):
        y = case.lora(layer)
        assert y.dtype == dtype
        found = case.gradients(y, leaves)
        assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves]
        assert_near((y, *found), (case.plain(), *wanted), TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_values_and_gradients(shape, dtype):
    case = Inputs(*shape, dtype)
    leaves = (case.x, case.bias)
    wanted = case.gradients(case.plain(with_adapter=False), leaves)
    for layer in (frozen_linear, frozen_linear_reference):
        y = case.frozen(layer)
        assert y.dtype == dtype
        found = case.gradients(y, leaves)
        assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves]
        assert_near((y, *found), (case.plain(with_adapter=False), *wanted), TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradcheck(shape, bias):
    case = Inputs(*shape, torch.float64)
    given = case.bias if bias else None
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, case.expand, b), (case.x, given))
    arguments = (case.x, given, case.a, case.b)
    assert torch.autograd.gradcheck(lambda x, c, a, b: lora_linear(x, case.expand, c, a, b, SCALING), arguments)


def test_a_second_derivative_is_refused_not_wrong():
    case = Inputs((3,), 5, 4, 2, torch.float64)
    for y, leaf in ((case.lora(), case.a), (case.frozen(), case.bias)):
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(lead):
    case = Inputs(lead, 6, 5, 2, torch.float32)
    y = case.lora()
    assert y.shape == (*lead, 5)
    grad_x, *rest = case.gradients(y, (case.x, case.a, case.b, case.bias))
    assert grad_x.shape == (*lead, 6)
    assert all(not grad.any() for grad in rest)
    assert case.frozen().shape == (*lead, 5)


def test_strided_inputs_and_gradients():
    case = Inputs((4, 6), 10, 14, 3, torch.float32)
    for layer in (case.lora, case.frozen):
        leaves = (case.x, case.a, case.b, case.bias) if layer == case.lora else (case.x, case.bias)
        dense_y = layer()
        dense = case.gradients(dense_y, leaves)
        straight_x, straight_grad = case.x, case.grad_y
        case.x = straight_x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        case.grad_y = straight_grad.transpose(0, 1).contiguous().transpose(0, 1)
        assert not case.x.is_contiguous()
        assert not case.grad_y.is_contiguous()
        strided_y = layer()
        strided = case.gradients(strided_y, (case.x, *leaves[1:]))
        assert_near((strided_y, *strided), (dense_y, *dense), 1e-6)
        case.grad_y = torch.ones(()).expand(4, 6, 14)  # what .sum().backward() hands on: stride 0
        expanded = case.gradients(layer(), (case.x, *leaves[1:]))
        case.grad_y = torch.ones(4, 6, 14)
        assert_near(expanded, case.gradients(layer(), (case.x, *leaves[1:])), 1e-6)
        case.x, case.grad_y = straight_x, straight_grad


@pytest.mark.parametrize("frozen", ["x", "a", "b", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen):
    case = Inputs((5,), 7, 6, 2, torch.float32)
    leaves = {"x": case.x, "a": case.a, "b": case.b, "bias": case.bias}
    wanted = dict(zip(leaves, case.gradients(case.lora(), tuple(leaves.values())), strict=True))
    leaves[frozen].requires_grad_(False)
    case.lora().backward(case.grad_y)
    assert leaves.pop(frozen).grad is None
    assert all(torch.equal(leaf.grad, wanted[name]) for name, leaf in leaves.items())
