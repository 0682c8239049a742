"""Smoothing leaves a model's function alone and makes it easier to round."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_ids, tiny_model

from qlora_kit.export.parameters import multiplied
from qlora_kit.export.smoothing import input_ranges, smoothing_factors, smoothing_pairs


def smooth(model, rows):
    """Multiplies the model's parameters by their factors; returns these."""
    factors = smoothing_factors(model, input_ranges(model, rows))
    for name, parameter in model.named_parameters():
        parameter.data = multiplied(name, parameter.data, factors)
    return factors


def rounded(model, ids):
    """Logits with weights and activations rounded to 8 bit in blocks of 4, as the int8 kernels do with 32."""

    def round_blocks(x):
        blocks = x.reshape(*x.shape[:-1], -1, 4)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return (torch.round(blocks / scale) * scale).reshape(x.shape)

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    kept = [module.weight.data for module in linear]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: (round_blocks(inputs[0]),)) for module in linear]
    for module in linear:
        module.weight.data = round_blocks(module.weight.data)
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    for module, weight in zip(linear, kept):
        module.weight.data = weight
    return logits


def outlier_model(arch):
    """A tiny model whose norms blow up two channels, as large models' do."""
    model = tiny_model(arch).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[3] *= 60
            parameter.data[17] *= -40
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_function_stays_the_same(arch):
    model, ids = tiny_model(arch).float().eval(), tiny_ids()
    with torch.no_grad():
        before = model(ids).logits
        smooth(model, ids.tolist())
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral"])
def test_rounding_error_falls(arch):
    model, ids = outlier_model(arch), tiny_ids()
    with torch.no_grad():
        exact = model(ids).logits
    before = (rounded(model, ids) - exact).abs().mean()
    layers = sum(len(pair.layers) for pair in smoothing_pairs(model))
    factors = smooth(model, ids.tolist())
    assert sum(name.endswith("proj.weight") for name in factors) == layers > 0
    after = (rounded(model, ids) - exact).abs().mean()
    assert after < 0.8 * before


def test_layers_not_built_like_llama_are_left_alone():
    assert [pair for pair in smoothing_pairs(tiny_model("gpt2"))] == []
    sources = {type(pair.source).__name__ for pair in smoothing_pairs(tiny_model("gemma"))}
    assert sources == {"Linear"}  # Gemma's norm multiplies by 1 + weight: nothing can be folded into it


def test_no_rows_change_nothing():
    model = tiny_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert smooth(model, []) == {}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
