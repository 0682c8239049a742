"""Checkpointed inputs in host memory: the bits of plain checkpointing, memory reused, two inputs on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import tiny_ids, tiny_model
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from qlora_kit.errors import OutOfMemory
from qlora_kit.kernels import offloaded_inputs
from qlora_kit.kernels.offloaded_inputs import InputStore, offload_inputs, offloaded
from qlora_kit.kernels.tiled_mlp import tile_mlps

CPU = torch.device("cpu")
PLAIN = partial(checkpoint, use_reentrant=False)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need CUDA")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=needs_cuda)]
Run = Callable[..., Any]


def on_cpu(function: Run, *args: Tensor) -> Any:
    """torch's own offloading, in the way of the computation."""
    with save_on_cpu():
        return PLAIN(function, *args)


def outcome(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layers: int = 5
) -> list[Tensor]:
    """Values and gradients of layers with dropout, of which each is run by `run`."""
    torch.manual_seed(0)
    width = shape[-1]
    model = nn.ModuleList(
        nn.Sequential(nn.Linear(width, 3 * width), nn.Dropout(0.3), nn.GELU(), nn.Linear(3 * width, width))
        for _ in range(layers)
    ).to(device, dtype)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y = x * 1  # as behind an embedding
    for layer in model:
        y = y + run(layer, y)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 11, 6), (2, 33, 5)], ids=str)
def test_values_and_gradients_have_the_bits_of_plain_checkpointing(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloaded_inputs, "PIECE_BYTES", 64)  # several a tensor, the last one not full
    store = InputStore(device)
    found = outcome(partial(offloaded, store, PLAIN), shape, dtype, device)
    for run in (PLAIN, on_cpu):
        for one, other in zip(found, outcome(run, shape, dtype, device), strict=True):
            assert torch.equal(one, other)
    again = outcome(partial(offloaded, store, PLAIN), shape, dtype, device)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


def test_host_memory_is_used_again_and_grows_with_the_longest() -> None:
    store = InputStore(CPU)
    run = partial(offloaded, store, PLAIN)
    sizes = []
    for length in (9, 9, 4, 3 * 2**18, 9):  # the fourth has three pieces a layer
        outcome(run, (1, length, 4), torch.float32, CPU, layers=3)
        sizes.append(store.host_bytes // offloaded_inputs.PIECE_BYTES)
    assert sizes == [3, 3, 3, 9, 9]


def test_two_inputs_lie_on_the_device() -> None:
    store = InputStore(CPU)
    kept = [store.keep(torch.full((2, 3), float(k))) for k in range(6)]
    assert [one.on_device is not None for one in kept] == [False] * 4 + [True] * 2
    for place in reversed(range(6)):
        assert torch.equal(store.bring_back(kept[place]), torch.full((2, 3), float(place)))
        there = [k for k, one in enumerate(kept) if one.on_device is not None]
        assert there == ([place - 1] if place else []), "the next one is on its way, no other"
    assert torch.equal(store.bring_back(kept[4]), torch.full((2, 3), 4.0)), "a graph that is kept is walked twice"


def test_a_graph_may_be_walked_twice() -> None:
    def twice(run: Run) -> Tensor:
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 4), torch.randn(2, 3, 4).requires_grad_()
        y = run(layer, run(layer, run(layer, x * 1))).sum()
        y.backward(retain_graph=True)
        y.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(twice(partial(offloaded, InputStore(CPU), PLAIN)), twice(PLAIN))


def test_what_nobody_walks_gives_its_memory_back() -> None:
    store = InputStore(CPU)
    for _ in range(3):
        offloaded(store, PLAIN, nn.Linear(4, 4), torch.randn(2, 3, 4, requires_grad=True) * 1)
    assert store.host_bytes == offloaded_inputs.PIECE_BYTES


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "gemma2"])
def test_a_model_has_the_same_loss_and_gradients(arch: str, tiles: int) -> None:
    dropped = {"resid_pdrop": 0.2} if arch in ("gpt2", "phi3") else {"attention_dropout": 0.2}
    ids, mask, found = tiny_ids(0, 2, 13), torch.ones(2, 13, dtype=torch.long), []
    mask[1, 9:] = 0
    for away in (False, True):
        model: Any = tiny_model(arch, num_hidden_layers=4, **dropped).train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        store = offload_inputs(model, CPU) if away else None
        if tiles > 1:
            tile_mlps(model, tiles)
        torch.manual_seed(3)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        if store is not None:
            assert store.host_bytes == 4 * offloaded_inputs.PIECE_BYTES, "each layer's input, and no mask"
        found.append([loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_cannot_be_pinned() -> None:
    with pytest.raises(
        OutOfMemory, match=r"gives no 4\.0 MiB of pinned memory.*set train\.gradient_checkpointing=true"
    ):
        InputStore(CPU, pin=True).keep(torch.ones(3))


@needs_cuda
def test_the_device_holds_two_inputs_of_many() -> None:
    device, shape = torch.device("cuda"), (4, 1024, 512)
    peaks = []
    for run in (PLAIN, partial(offloaded, InputStore(device), PLAIN)):
        torch.cuda.reset_peak_memory_stats()
        outcome(run, shape, torch.bfloat16, device, layers=32)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] - peaks[1] > 25 * 4 * 1024 * 512 * 2
