"""MLPs in tiles of the sequence: values and gradients of the whole, and less of it at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_ids, tiny_model
from torch import Tensor, nn

from qlora_kit.kernels.tiled_mlp import tile_mlps, tiled

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def gated(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 21), nn.GELU(), nn.Linear(21, 6)).to(dtype)


@pytest.mark.parametrize("tiles", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 11, 6), (2, 32, 6)], ids=str)
def test_tiles_equal_the_whole(shape: tuple[int, int, int], dtype: torch.dtype, tiles: int) -> None:
    found = []
    for in_tiles in (False, True):
        mlp, x = gated(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        y = tiled(mlp, tiles, x) if in_tiles else mlp(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(weight.grad for weight in mlp.parameters())])
    for one, other in zip(found[1], found[0], strict=True):
        assert one is not None and other is not None
        scale = max(1e-3, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_no_more_than_a_tile_goes_through_at_once() -> None:
    mlp, seen = gated(torch.float32), []
    mlp[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[1]))
    tiled(mlp, 4, torch.randn(2, 18, 6, requires_grad=True)).sum().backward()
    assert max(seen) == 5 and sum(seen) == 2 * 18


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "gemma2"])
def test_a_model_with_tiled_mlps_has_the_same_gradients(arch: str, checkpointing: bool) -> None:
    ids, found = tiny_ids(0, 2, 13), []
    for in_tiles in (False, True):
        model: Any = tiny_model(arch).eval()
        model.requires_grad_(True)
        if checkpointing:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if in_tiles:
            assert tile_mlps(model, 3) == model.config.num_hidden_layers
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        scale = max(1e-3, plain.abs().max().item())
        torch.testing.assert_close(found[1][name], plain, rtol=0, atol=1e-5 * scale, msg=name)


def test_experts_are_left_alone() -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.experts = nn.ModuleList([gated(torch.float32)])

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert tile_mlps(Moe(), 2) == 0
