"""States of bitsandbytes' optimizers in a checkpoint: they come back as they were, and into their own kind only."""

from __future__ import annotations

import pytest
import torch
from optim_steps import copies, make_adamw, random_weights, run
from torch import nn

from qlora_kit.errors import CheckpointError
from qlora_kit.model.quantized import bnb
from qlora_kit.train.optim import AdapterOptimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit"])
def test_states_of_bitsandbytes_go_on_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    """Weights of 4096 elements and more have 8-bit states, smaller ones fp32 states."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return getattr(bnb.optim, kind)(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)

    def weights() -> dict[str, nn.Parameter]:
        torch.manual_seed(0)
        return {name: nn.Parameter(torch.randn(n, 64).to(dtype)) for name, n in (("large", 80), ("small", 3))}

    whole, first = (AdapterOptimizer(weights(), make) for _ in range(2))
    start = copies(first)
    run(whole, range(8))
    run(first, range(5))
    tensors, numbers = first.state()
    assert tensors["small/state1"].dtype == torch.float32
    assert tensors["large/state1"].dtype == (torch.uint8 if kind.endswith("8bit") else torch.float32)
    asked: list[tuple[int, ...]] = []
    second = AdapterOptimizer(copies(first), make)
    for inner in second._inner.values():
        own = inner.get_state_buffer  # where a paged optimizer takes its memory from
        inner.get_state_buffer = lambda p, dtype, own=own: (asked.append(tuple(p.shape)), own(p, dtype=dtype))[1]
    second.load_state(tensors, numbers)
    assert asked == [(80, 64), (80, 64), (3, 64), (3, 64)]
    run(second, range(5, 8))
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]) and not torch.equal(parameter, start[name])
    expected, found = whole.state(), second.state()
    assert expected[1] == found[1] and expected[0].keys() == found[0].keys()
    assert all(torch.equal(tensor, found[0][key]) for key, tensor in expected[0].items())


def test_states_of_another_optimizer_are_refused() -> None:
    theirs = AdapterOptimizer(random_weights(torch.float32), bnb.optim.AdamW8bit)
    ours = AdapterOptimizer(random_weights(torch.float32), make_adamw())
    run(theirs, range(2))
    run(ours, range(2))
    with pytest.raises(CheckpointError, match=r"state of a is not that of AdamW \(got .*'state1', 'state2'.*exp_avg"):
        ours.load_state(*theirs.state())
    with pytest.raises(CheckpointError, match=r"state of a is not that of AdamW8bit \(got .*'exp_avg'"):
        theirs.load_state(*ours.state())
