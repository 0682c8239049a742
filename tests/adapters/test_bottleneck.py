"""Bottleneck adapters against a plain reimplementation with hooks, and where each architecture gets them.

The library `adapters` 1.3.0 needs transformers 4.57 and cannot be installed beside version 5. Compared once by hand
(version 4.57.6, Llama and BERT, `double_seq_bn`), its outputs were those of `placement: houlsby` to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import randomize
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_ids, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel

from qlora_kit.adapters.bottleneck import ACTIVATIONS, Bottleneck, BottleneckLinear
from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import BottleneckSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

FP32 = BottleneckSettings(reduction_factor=9, dtype="fp32")
ENCODERS = ("bert", "roberta", "electra", "distilbert", "deberta-v2", "albert", "mpnet", "modernbert")
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "dim": 16, "hidden_dim": 24, "intermediate_size": 24, "n_heads": 2,
    "num_attention_heads": 2, "num_hidden_layers": 2, "n_layers": 2, "pad_token_id": 0, "embedding_size": 16,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    return model.eval()(tiny_ids()).logits


class PlainAdapter(nn.Module):
    """The adapter as the papers draw it, of torch's own layers."""

    def __init__(self, layer: BottleneckLinear, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(*layer.down.shape[::-1]), nn.Linear(*layer.up.shape[::-1])
        self.activation = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[activation]
        for mine, its in ((self.down, (layer.down, layer.down_bias)), (self.up, (layer.up, layer.up_bias))):
            mine.weight.data.copy_(its[0])
            mine.bias.data.copy_(its[1])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.up(self.activation(self.down(h)))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_it_computes_and_learns_as_a_plain_one(arch: str, activation: str, placement: str) -> None:
    ours, plain = tiny_model(arch), tiny_model(arch).requires_grad_(False)
    settings = FP32.model_copy(update={"activation": activation, "placement": placement})
    names = Bottleneck(settings).inject(ours)
    assert torch.equal(logits(ours), logits(plain))  # the start is the base's own function
    randomize(ours)
    beside: dict[str, PlainAdapter] = {}
    for name in names:
        layer = ours.get_submodule(name)
        assert isinstance(layer, BottleneckLinear) and layer.down.shape == (64 // 9, 64)
        beside[name] = PlainAdapter(layer, activation)
        plain.get_submodule(name).register_forward_hook(lambda _m, _x, h, a=beside[name]: a(h))
    torch.testing.assert_close(logits(ours), logits(plain), rtol=0, atol=1e-5)
    for model in (ours, plain):
        logits(model).square().mean().backward()
    for name, adapter in beside.items():
        layer = ours.get_submodule(name)
        for own, other in (("down", adapter.down), ("up", adapter.up)):
            for mine, its in ((own, other.weight), (f"{own}_bias", other.bias)):
                torch.testing.assert_close(getattr(layer, mine).grad, its.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_its_places(arch: str) -> None:
    assert len(Bottleneck(FP32).inject(tiny_model(arch))) == 4  # two in each of two layers
    assert len(Bottleneck(FP32.model_copy(update={"placement": "pfeiffer"})).inject(tiny_model(arch))) == 2


@pytest.mark.parametrize("arch", ENCODERS)
def test_encoders_have_their_places(arch: str) -> None:
    config = AutoConfig.for_model(arch)
    config = AutoConfig.for_model(arch, **{key: value for key, value in SMALL.items() if hasattr(config, key)})
    model = AutoModel.from_config(config).eval()
    ids = torch.arange(4, 16).view(2, 6)
    before = model(ids).last_hidden_state
    names = Bottleneck(FP32).inject(model)
    layers = 1 if arch == "albert" else 2  # whose layers share their weights
    assert len(names) == 2 * layers and not any("intermediate" in name or "pooler" in name for name in names)
    torch.testing.assert_close(model(ids).last_hidden_state, before)
    randomize(model)
    assert (model(ids).last_hidden_state - before).abs().max() > 1e-3


def test_places_that_are_not_known_are_asked_for() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.last = layer.mlp.down_proj
        del layer.mlp.down_proj
    match = "output projection of the feed-forward part is known in LlamaForCausalLM.*target_modules.*last"
    with pytest.raises(AdapterError, match=match):
        Bottleneck(FP32).inject(model)
    named = FP32.model_copy(update={"target_modules": ["last"]})
    assert Bottleneck(named).inject(model) == ["model.layers.0.mlp.last", "model.layers.1.mlp.last"]


def test_a_bottleneck_is_at_least_one_wide() -> None:
    model = tiny_model("llama")
    Bottleneck(FP32.model_copy(update={"reduction_factor": 1000})).inject(model)
    assert {layer.down.shape for _, layer in adapted_layers(model)} == {(1, 64)}  # type: ignore[union-attr]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_on_a_quantized_base_in_bf16(tmp_path: Path, quant: str) -> None:
    save_tiny_model(tmp_path / "base")
    base = find_base(str(tmp_path / "base"))
    model = load_base(base, quant, compute_dtype=torch.bfloat16)
    before = logits(model)
    method = Bottleneck(BottleneckSettings(activation="silu", placement="pfeiffer", modules_to_save=["model.norm"]))
    method.inject(model)
    assert torch.equal(logits(model), before)
    randomize(model)
    after = logits(model)
    after.float().square().mean().backward()
    trained = trainable_parameters(model)
    assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
    assert all(parameter.grad is not None for parameter in trained.values())
    save_adapter(model, method, tmp_path / "adapter", "tiny")
    again = load_base(base, quant, compute_dtype=torch.bfloat16)
    loaded = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    kept = {"activation", "placement", "dtype", "reduction_factor", "modules_to_save"}
    assert loaded.settings.model_dump(include=kept) == method.settings.model_dump(include=kept)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [("activation", "selu", "activation: input should be 'relu'.*selu"), ("placement", None, "placement")],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, field: str, value: Any, match: str) -> None:
    model, method = tiny_model("llama"), Bottleneck(FP32)
    method.inject(model)
    save_adapter(model, method, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {field: value}))
    with pytest.raises(AdapterError, match=match):
        load_adapter(tiny_model("llama"), tmp_path)
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=f"field '{field}' is missing"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_it_cannot_be_merged() -> None:
    model = tiny_model("llama")
    Bottleneck(FP32).inject(model)
    with pytest.raises(AdapterError, match="BottleneckLinear cannot be merged"):
        next(adapted_layers(model))[1].merged()  # type: ignore[operator]
