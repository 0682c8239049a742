"""Kept precision, schedules and clipping, against torch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_steps import copies, gradient, make_adamw, random_weights, run
from torch import Tensor, nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers.optimization import get_linear_schedule_with_warmup

from qlora_kit.errors import CheckpointError
from qlora_kit.kernels.split_fp32 import join_fp32, split_fp32
from qlora_kit.train.optim import (
    AdapterOptimizer,
    clip_factor,
    gradient_norm,
    lr_at,
    optimizer_maker,
)

CPU = torch.device("cpu")


def masters(optimizer: AdapterOptimizer) -> dict[str, Tensor]:
    return {name: join_fp32(p.detach(), optimizer.low_bits[name]) for name, p in optimizer.parameters.items()}


def test_kept_precision_equals_torch_adamw_on_fp32_weights_bit_for_bit() -> None:
    kept = AdapterOptimizer(random_weights(torch.bfloat16), make_adamw())
    reference = {name: nn.Parameter(p.detach().float()) for name, p in random_weights(torch.bfloat16).items()}
    adamw = torch.optim.AdamW(reference.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(50):
        for parameter in reference.values():
            parameter.grad = gradient(step, parameter.bfloat16()).float()
        adamw.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
        adamw.step()
    run(kept, range(50))
    for name, master in masters(kept).items():
        assert torch.equal(master, reference[name].detach()), name
        assert torch.equal(kept.parameters[name].detach(), split_fp32(master)[0])


def test_fp32_weights_equal_torch_adamw_bit_for_bit() -> None:
    own = AdapterOptimizer(random_weights(torch.float32), make_adamw())
    assert own.low_bits == {}
    reference = random_weights(torch.float32)
    adamw = torch.optim.AdamW(reference.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(20):
        for parameter in reference.values():
            parameter.grad = gradient(step, parameter)
        adamw.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
        adamw.step()
    run(own, range(20))
    for name, parameter in own.parameters.items():
        assert torch.equal(parameter, reference[name])


@pytest.mark.parametrize(("keep", "moved"), [(True, True), (False, False)])
def test_updates_below_a_256th_of_a_weight_are_lost_unless_precision_is_kept(keep: bool, moved: bool) -> None:
    weights = {"w": nn.Parameter(torch.full((8,), 1.0, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(weights, make_adamw(0.0), keep_precision=keep)
    for _ in range(100):
        weights["w"].grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.set_lr(1e-3)  # 100 steps of 1/1000: each below 1/256
        optimizer.step()
    assert bool((weights["w"] < 0.95).all()) is moved
    assert bool((weights["w"] == 1.0).all()) is not moved


def test_weight_decay_is_decoupled() -> None:
    weights = {"w": nn.Parameter(torch.full((3,), 2.0))}
    optimizer = AdapterOptimizer(weights, make_adamw(0.1))
    weights["w"].grad = torch.zeros(3)
    optimizer.set_lr(0.5)
    optimizer.step()
    torch.testing.assert_close(weights["w"].detach(), torch.full((3,), 2.0 * (1 - 0.5 * 0.1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    whole, first = (AdapterOptimizer(random_weights(dtype), make_adamw()) for _ in range(2))
    run(whole, range(12))
    run(first, range(7))
    tensors, numbers = first.state()
    second = AdapterOptimizer(copies(first), make_adamw())
    run(first, range(7, 9))  # the state saved is a copy
    second.load_state(tensors, numbers)
    run(second, range(7, 12))
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name])
        assert dtype == torch.float32 or torch.equal(whole.low_bits[name], second.low_bits[name])


def test_state_of_other_weights_is_refused() -> None:
    optimizer = AdapterOptimizer(random_weights(torch.bfloat16), make_adamw())
    run(optimizer, range(2))
    tensors, numbers = optimizer.state()
    with pytest.raises(CheckpointError, match="optimizer state of other, which this run does not train"):
        optimizer.load_state({"other/exp_avg": torch.zeros(3)}, {})
    without = AdapterOptimizer(random_weights(torch.bfloat16), make_adamw(), keep_precision=False)
    with pytest.raises(CheckpointError, match=r"kept low bits of a do not match adapter\.keep_precision"):
        without.load_state(tensors, numbers)
    with pytest.raises(CheckpointError, match=r"shape of b/exp_avg"):
        optimizer.load_state({**tensors, "b/exp_avg": torch.zeros(4, 9)}, numbers)


def test_weights_without_a_gradient_stay_and_can_be_saved() -> None:
    optimizer = AdapterOptimizer(random_weights(torch.bfloat16), make_adamw(0.5))
    before = optimizer.parameters["b"].detach().clone()
    for step in range(3):
        optimizer.parameters["a"].grad = gradient(step, optimizer.parameters["a"])
        optimizer.set_lr(0.1)
        optimizer.step()
    assert torch.equal(optimizer.parameters["b"], before)
    again = AdapterOptimizer(
        {n: nn.Parameter(p.detach().clone()) for n, p in optimizer.parameters.items()}, make_adamw(0.5)
    )
    again.load_state(*optimizer.state())
    run(optimizer, range(3, 6))
    run(again, range(3, 6))
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter, again.parameters[name])


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_on_a_cpu_torch_adamw_takes_the_place_of_bitsandbytes_and_says_so(kind: str) -> None:
    make, note = optimizer_maker(kind, (0.9, 0.999), 1e-8, 0.0, CPU)
    assert note == f"optimizer {kind} needs CUDA; torch AdamW with fp32 states takes its place"
    assert isinstance(make([nn.Parameter(torch.zeros(2))]), torch.optim.AdamW)
    assert optimizer_maker("adamw", (0.9, 0.999), 1e-8, 0.0, CPU)[1] is None


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
        ("constant", lambda o, w, n: get_constant_schedule_with_warmup(o, w)),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (9, 10), (10, 10)])
def test_schedules_are_those_of_transformers(schedule: str, make: Any, warmup: int, total: int) -> None:
    """After the warm-up the same; in it ours is a step ahead, so that the first step is not wasted on rate 0."""
    theirs = make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup, total).lr_lambdas[0]
    for step in range(1, total + 1):
        expected = theirs(step) if step <= warmup and step < total else theirs(step - 1) if step > warmup else 1.0
        assert lr_at(step, 3e-4, schedule, warmup, total) == pytest.approx(3e-4 * expected, rel=1e-12), step
    assert all(lr_at(step, 1.0, schedule, warmup, total) > 0 for step in range(1, total + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_against_torch_in_fp32(dtype: torch.dtype, max_norm: float | None) -> None:
    plain = random_weights(torch.float32)
    own = {name: nn.Parameter(p.detach().to(dtype)) for name, p in plain.items()}
    optimizer = AdapterOptimizer(own, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    masters = {name: p.detach().float().clone() for name, p in own.items()}
    for step, name in enumerate(plain):
        own[name].grad = gradient(step, own[name])
        plain[name].grad = own[name].grad.float().clone()
    expected = torch.nn.utils.clip_grad_norm_(plain.values(), max_norm or 1e30, foreach=False)
    norm = gradient_norm(list(own.values()))
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    optimizer.step(clip_factor(norm, max_norm))
    for name, weight in own.items():
        now = weight.detach() if dtype == torch.float32 else join_fp32(weight.detach(), optimizer.low_bits[name])
        torch.testing.assert_close(masters[name] - now, plain[name].grad, rtol=1e-5, atol=1e-6)
    assert gradient_norm(list(own.values())) == norm  # methods look at the gradients after the step


def test_a_norm_that_bf16_could_not_sum_is_right() -> None:
    parameter = nn.Parameter(torch.zeros(70_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert gradient_norm([parameter]) == pytest.approx(70_000**0.5, rel=1e-6)


def test_an_infinite_norm_is_told_and_no_gradient_is_no_error() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert gradient_norm([parameter]) == 0.0
    assert clip_factor(0.0, 1.0) == 1.0
    parameter.grad = torch.tensor([1.0, torch.inf])
    assert gradient_norm([parameter]) == torch.inf
