"""What weighs a weight's columns: moments of inputs against sums by hand, weighed factors against dense solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model, tiny_ids, tiny_model
from torch import nn

from qlora_kit.adapters.factors import best_factors
from qlora_kit.adapters.inject import adapted_layers, wanted_targets
from qlora_kit.adapters.input_moments import input_moments, weighing
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import LoftqSettings
from qlora_kit.adapters.svd_init import Loftq
from qlora_kit.errors import AdapterError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import BaseSource, find_base

LOFTQ = LoftqSettings(rank=3, alpha=7.0, dtype="fp32", niter=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSource:
    return find_base(str(save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2")))


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """The last row of each is padded."""
    masks = torch.ones(2, 12, dtype=torch.long)
    masks[1, 8:] = 0
    return [{"input_ids": tiny_ids(seed), "attention_mask": masks} for seed in range(count)]


def skewed(features: int, seed: int = 0) -> torch.Tensor:
    """Inputs [200, features] of very different sizes, each related to the next."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, features, generator=generator) * torch.logspace(-1, 1, features)
    return x + 0.7 * x.roll(1, 1)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_moments_by_hand(arch: str) -> None:
    model: Any = tiny_model(arch)
    names = wanted_targets(model, LOFTQ)
    means, wholes = (input_moments(model.train(), names, batches(), full) for full in (False, True))
    assert list(means) == list(wholes) and set(means) == set(names) and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name in names:
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches():
                model.eval()(**batch)
        hook.remove()
        x = torch.cat([part[batch["attention_mask"].bool()] for part, batch in zip(seen, batches())])
        torch.testing.assert_close(wholes[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(means[name], x.square().mean(0), rtol=1e-4, atol=1e-5)


def test_layers_of_one_input_share_its_moment() -> None:
    model: Any = tiny_model("llama")
    found = input_moments(model, wanted_targets(model, LOFTQ), batches(), full=True)
    layer = "model.layers.1."
    assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.v_proj"]
    assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
    assert len({id(moment) for moment in found.values()}) == 2 * 4


def test_an_input_that_is_no_row_of_tokens_is_refused() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.linear(torch.ones(input_ids.numel(), 4))

    with pytest.raises(AdapterError, match=r"linear: its input is not one row a token \(got \[24, 4\]\)"):
        input_moments(Folded(), ["linear"], batches())


@pytest.mark.parametrize("full", [False, True])
def test_the_root_is_one(full: bool) -> None:
    x = skewed(20)
    moment = x.T @ x / len(x) if full else x.square().mean(0)
    found = weighing(moment)
    eye = torch.eye(20)
    torch.testing.assert_close(found.undo(found.apply(eye)), eye, rtol=0, atol=1e-4)
    scaled = moment / (moment.diagonal() if full else moment).mean()
    wanted = scaled if full else torch.diag(scaled)
    torch.testing.assert_close(found.apply(found.apply(eye)), wanted, rtol=0, atol=2e-4)
    dead = weighing(torch.zeros_like(moment))  # a layer that nothing goes into
    assert torch.isfinite(dead.undo(dead.apply(eye))).all()


@pytest.mark.parametrize("niter", [0, 16])
@pytest.mark.parametrize("full", [False, True])
def test_weighed_factors_are_the_best_of_their_rank(full: bool, niter: int) -> None:
    """Against the dense solution in float64, and in what counts: the error of the layer's output."""
    x, matrix = skewed(24), torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x / len(x) if full else x.square().mean(0)
    settings = LOFTQ.model_copy(update={"niter": niter})
    a, b = best_factors(matrix, settings, weighing(moment))
    product = settings.scaling * b @ a
    root = torch.linalg.cholesky(moment.double()) if full else moment.double().sqrt().diag()
    u, s, vh = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    wanted = ((u[:, :3] * s[:3]) @ vh[:3] @ root.inverse()).float()
    torch.testing.assert_close(product, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
    left = ((matrix - product).double() @ root).norm()
    assert left.item() == pytest.approx(s[3:].norm().item(), rel=1e-3)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    plain_a, plain_b = best_factors(matrix, settings)
    assert left < 0.9 * ((matrix - settings.scaling * plain_b @ plain_a).double() @ root).norm()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_inputs_that_are_all_alike_change_nothing(base: BaseSource, iterations: int, full: bool) -> None:
    starts = []
    for weighed in (False, True):
        model = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
        method = Loftq(LOFTQ.model_copy(update={"iterations": iterations}))
        if weighed:
            sizes = {name: model.get_submodule(name).in_features for name in wanted_targets(model, method.settings)}
            method.moments = {n: 4 * torch.eye(size) if full else torch.full((size,), 4.0) for n, size in sizes.items()}
        method.inject(model)
        starts.append({name: layer.merged_weights()["weight"][0] for name, layer in adapted_layers(model)})
    for name, weight in starts[0].items():
        same = (starts[1][name] - weight).abs() < 1e-4
        assert same.all() if iterations == 1 else same.float().mean() > 0.9  # a code between two may fall either way


def test_a_weighed_start_moves_the_outputs_less(base: BaseSource) -> None:
    """Over the calibration rows, what the layers give is nearer to the whole base's than after plain LoftQ."""
    whole = load_base(base, compute_dtype=torch.float32)
    names = wanted_targets(whole, LOFTQ)
    moments = {full: input_moments(whole, names, batches(), full) for full in (False, True)}
    errors: dict[str, float] = {}
    for kind in ("plain", "diagonal", "full"):
        model = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
        method = Loftq(LOFTQ.model_copy(update={"iterations": 1}))
        method.moments = {} if kind == "plain" else dict(moments[kind == "full"])
        method.inject(model)
        total = 0.0
        for name, layer in adapted_layers(model):
            error = layer.merged_weights()["weight"][0] - whole.get_submodule(name).weight.detach()
            total += ((error @ moments[True][name]) * error).sum().item()
        errors[kind] = total
    assert errors["full"] < errors["diagonal"] < errors["plain"]


def test_a_weighed_adapter_is_stored_and_loaded_without_its_moments(tmp_path: Path, base: BaseSource) -> None:
    model = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
    method = Loftq(LOFTQ)
    method.moments = input_moments(model, wanted_targets(model, LOFTQ), batches())
    method.inject(model)
    save_adapter(model, method, tmp_path, "tiny")
    again = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(tiny_ids()).logits, model.eval()(tiny_ids()).logits)
