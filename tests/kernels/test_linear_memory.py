"""What the fused layers keep, and how they behave inside larger graphs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kit.kernels.frozen_linear import frozen_linear, frozen_linear_reference
from qlora_kit.kernels.lora_linear import lora_linear, lora_linear_reference

IN, OUT, RANK, TOKENS = 48, 40, 4, 6


class Layer:
    """A layer whose expansions are counted and watched."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(OUT, IN, generator=generator).to(dtype)
        self.a = torch.randn(RANK, IN, generator=generator).requires_grad_()
        self.b = torch.randn(OUT, RANK, generator=generator).requires_grad_()
        self.bias = torch.randn(OUT, generator=generator).requires_grad_()
        self.x = torch.randn(TOKENS, IN, generator=generator).to(dtype).requires_grad_()
        self.alive: list[weakref.ref[Tensor]] = []

    def expand(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype).clone()
        self.alive.append(weakref.ref(weight))
        return weight

    def lora(self, x: Tensor, layer=lora_linear) -> Tensor:
        return layer(x, self.expand, self.bias, self.a, self.b, 0.5)

    def frozen(self, x: Tensor, layer=frozen_linear) -> Tensor:
        return layer(x, self.expand, self.bias)

    def grads(self) -> tuple[Tensor, ...]:
        found = tuple(t.grad for t in (self.x, self.a, self.b, self.bias))
        for tensor in (self.x, self.a, self.b, self.bias):
            tensor.grad = None
        return found


def saved_by(run) -> tuple[list[Tensor], Tensor]:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = run()
    return saved, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_saves_only_its_input_the_low_rank_product_and_the_adapter(dtype):
    layer = Layer(dtype)
    saved, y = saved_by(lambda: layer.lora(layer.x))
    gc.collect()
    assert y.grad_fn is not None
    assert sorted(tuple(t.shape) for t in saved) == sorted([(TOKENS, IN), (TOKENS, RANK), (RANK, IN), (OUT, RANK)])
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert layer.x.untyped_storage().data_ptr() in storages  # x itself, not a copy of it
    assert {layer.a.untyped_storage().data_ptr(), layer.b.untyped_storage().data_ptr()} <= storages
    assert all(ref() is None for ref in layer.alive)  # the expanded weight is gone, also from the context


def test_frozen_saves_nothing_and_the_reference_keeps_the_weight():
    layer = Layer()
    saved, y = saved_by(lambda: layer.frozen(layer.x))
    gc.collect()
    assert y.grad_fn is not None
    assert saved == []
    assert all(ref() is None for ref in layer.alive)
    saved, y = saved_by(lambda: layer.frozen(layer.x, frozen_linear_reference))
    assert (OUT, IN) in [tuple(t.shape) for t in saved] or (IN, OUT) in [tuple(t.shape) for t in saved]


def test_the_weight_is_expanded_once_a_pass():
    layer = Layer()
    y = layer.lora(layer.x)
    assert len(layer.alive) == 1
    y.sum().backward()
    assert len(layer.alive) == 2
    layer.x.requires_grad_(False)  # the first layer of a model: no gradient goes further down
    layer.lora(layer.x).sum().backward()
    assert len(layer.alive) == 3


def test_without_gradients_nothing_is_saved():
    layer = Layer()
    with torch.no_grad():
        saved, y = saved_by(lambda: layer.lora(layer.x))
    assert saved == []
    assert not y.requires_grad
    assert torch.equal(y, layer.lora(layer.x))


def test_one_layer_used_twice_sums_its_gradients():
    layer = Layer()
    with torch.no_grad():
        layer.weight = layer.weight[:, :OUT].contiguous()
    layer.a = layer.a[:, :OUT].detach().clone().requires_grad_()
    layer.x = layer.x[:, :OUT].detach().clone().requires_grad_()
    layer.lora(torch.tanh(layer.lora(layer.x))).sum().backward()
    fused = layer.grads()
    layer.lora(torch.tanh(layer.lora(layer.x, lora_linear_reference)), lora_linear_reference).sum().backward()
    for one, other in zip(fused, layer.grads(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_a_changed_input_is_noticed():
    layer = Layer()
    x = layer.x.detach().clone().requires_grad_()
    middle = x * 1.0
    y = layer.lora(middle)
    middle.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_the_same_bits(dtype, reentrant):
    layer = Layer(dtype)
    y = torch.relu(layer.lora(layer.x))
    y.float().square().sum().backward()
    wanted = layer.grads()
    again = checkpoint(lambda x: torch.relu(layer.lora(x)), layer.x, use_reentrant=reentrant)
    again.float().square().sum().backward()
    assert torch.equal(again, y)
    assert all(torch.equal(one, other) for one, other in zip(layer.grads(), wanted, strict=True))


def test_deterministic_mode_gives_the_same_bits_each_time():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            layer = Layer(torch.bfloat16)
            layer.lora(layer.x).float().square().sum().backward()
            runs.append(layer.grads())
    finally:
        torch.use_deterministic_algorithms(before)
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_dropout_of_the_reference_is_on_the_adapter_only():
    layer = Layer()
    torch.manual_seed(0)
    all_dropped = lora_linear_reference(layer.x, layer.expand, layer.bias, layer.a, layer.b, 0.5, dropout=1.0)
    torch.testing.assert_close(all_dropped, layer.frozen(layer.x))


@pytest.mark.parametrize("layer", [lora_linear, lora_linear_reference])
def test_under_autocast_the_product_is_made_in_its_dtype(layer):
    case = Layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.lora(case.x, layer)
        assert y.dtype == torch.bfloat16
        assert case.frozen(case.x).dtype == torch.bfloat16
    y.float().square().sum().backward()
    found = case.grads()
    assert all(grad.dtype == torch.float32 for grad in found)
    case.lora(case.x.bfloat16(), layer).float().square().sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(found, case.grads(), strict=True))
