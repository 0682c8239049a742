"""The LoRA layer inside a model: what is wrapped, what is trained, in which dtype; dropout; fp16."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_ids, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import adapted_layers, find_targets, trainable_parameters
from qlora_kit.adapters.lora import Lora, LoraLinear
from qlora_kit.adapters.peft_format import adapter_tensors
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

SETTINGS = LoraSettings(rank=4, alpha=8.0, dtype="fp32")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_linear_is_every_linear_layer_but_the_head(arch):
    model = tiny_model(arch)
    head = model.get_output_embeddings()
    wanted = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    assert Lora(SETTINGS).inject(model) == wanted
    assert [name for name, _ in adapted_layers(model)] == wanted
    assert model.get_output_embeddings() is head
    assert set(trainable_parameters(model)) == {f"{n}.lora_{ab}" for n in wanted for ab in "AB"}


def test_targets_by_name_ending_regex_and_whole_name():
    model = tiny_model("llama")
    every = find_targets(model, ["q_proj"])
    assert every == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert find_targets(model, ["1.self_attn.q_proj"]) == every[1:]
    assert find_targets(model, [every[0]]) == every[:1]
    assert find_targets(model, r".*\.q_proj") == every
    assert find_targets(model, r".*(q_proj|lm_head)") == [*every, "lm_head"]


def test_all_linear_leaves_out_what_is_trained_in_full():
    model = tiny_model("llama")
    targets = Lora(SETTINGS.model_copy(update={"modules_to_save": ["layers.0.mlp", "lm_head"]})).inject(model)
    assert not [name for name in targets if "layers.0.mlp" in name]
    assert "model.layers.0.mlp.up_proj.weight" in trainable_parameters(model)
    assert "lm_head.weight" in trainable_parameters(model)


def test_a_fresh_adapter_starts_as_the_reference_implementation_does():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(300, 20), SETTINGS.model_copy(update={"rank": 16}))
    bound = 1 / math.sqrt(300)  # kaiming_uniform with a = sqrt(5)
    assert not layer.lora_B.any()
    assert 0.95 * bound < layer.lora_A.abs().max().item() <= bound
    assert abs(layer.lora_A.std().item() - bound / math.sqrt(3)) < 0.05 * bound
    torch.manual_seed(0)
    narrow = LoraLinear(nn.Linear(300, 20), SETTINGS.model_copy(update={"rank": 16, "dtype": "bf16"}))
    assert torch.equal(narrow.lora_A, layer.lora_A.bfloat16())


@pytest.mark.parametrize("base", [nn.Linear(12, 10), Conv1D(10, 12)], ids=["linear", "conv1d"])
def test_dropout_is_on_in_training_only_and_its_mean_is_no_dropout(base):
    torch.manual_seed(1)
    layer = LoraLinear(base, SETTINGS.model_copy(update={"dropout": 0.4}))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 12)
    with torch.no_grad():
        still = layer.eval()(x)
        assert torch.equal(still, layer(x))
        layer.train()
        draws = torch.stack([layer(x) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - still).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert error.max() < 5  # standard errors
    expected = layer.scaling * math.sqrt(0.4 / 0.6) * ((x.unsqueeze(1) * layer.lora_A) ** 2).sum(-1).sqrt()
    h = torch.stack([(nn.functional.dropout(x, 0.4) @ layer.lora_A.T) * layer.scaling for _ in range(2000)])
    torch.testing.assert_close(h.std(0), expected, rtol=0.15, atol=0.05)
    layer.dropout = 0.0
    assert torch.equal(layer(x), still)


def test_delta_is_what_the_layer_adds():
    for base in (nn.Linear(9, 7), Conv1D(7, 9)):
        layer = LoraLinear(base, SETTINGS.model_copy(update={"dtype": "bf16"}))
        nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 9)
        torch.testing.assert_close(layer(x) - base(x), x @ layer.delta().T, rtol=1e-4, atol=1e-5)
        assert layer.delta().dtype == torch.float32


def scaled_step(model: nn.Module) -> tuple[float, float]:
    """One fp16 training step as the loop makes it: (loss before, loss after)."""
    ids = tiny_ids(rows=1)
    parameters = list(trainable_parameters(model).values())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    loss = model.train()(ids, labels=ids).loss
    scaler.scale(loss.float()).backward()
    scaler.unscale_(optimizer)  # torch refuses gradients in fp16 here
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in parameters)
    optimizer.step()
    with torch.no_grad():
        return loss.item(), model(ids, labels=ids).loss.item()


@pytest.mark.parametrize(
    "arch,tie,changes,quant",
    [
        ("llama", True, {"modules_to_save": ["lm_head", "norm"]}, "nf4"),
        ("llama", False, {"modules_to_save": ["embed_tokens", "lm_head"]}, "int8"),
        ("llama", False, {"modules_to_save": ["layers.0.self_attn"]}, "nf4"),
        ("qwen2", False, {"bias": "lora_only"}, "nf4"),
        ("qwen2", False, {"bias": "lora_only"}, "none"),
        ("gpt2", True, {"bias": "all", "target_modules": ["c_attn"]}, "nf4"),
        ("gpt2", True, {"bias": "all", "target_modules": ["c_attn"]}, "none"),
    ],
    ids=["tied", "untied", "attention", "lora_only", "lora_only-none", "all", "all-none"],
)
def test_fp16_trains_everything_in_fp32(tmp_path, arch, tie, changes, quant):
    layers = {"n_layer": 1} if arch == "gpt2" else {"num_hidden_layers": 1}
    save_tiny_model(tmp_path, arch, tie, **layers)
    settings = SETTINGS.model_copy(update=changes)
    source = find_base(str(tmp_path))
    model = load_base(source, quant, compute_dtype=torch.float16, skip_modules=settings.modules_to_save)
    plain = load_base(source, quant, compute_dtype=torch.float16, skip_modules=settings.modules_to_save)
    Lora(settings).inject(model)
    with torch.no_grad():
        before, after = plain(tiny_ids(rows=1)).logits, model(tiny_ids(rows=1)).logits
    assert after.dtype == torch.float16
    torch.testing.assert_close(after, before, rtol=0, atol=0.02)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.01)
    trained = trainable_parameters(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    loss, lower = scaled_step(model)
    assert lower < loss
    assert all(t.dtype == torch.float32 for t in adapter_tensors(model, Lora(settings)).values())


def test_a_quantized_module_cannot_be_trained_in_full_unless_it_was_skipped(tmp_path):
    source = find_base(str(save_tiny_model(tmp_path)))
    settings = SETTINGS.model_copy(update={"target_modules": ["q_proj"], "modules_to_save": ["mlp"]})
    with pytest.raises(AdapterError, match=r"model.layers.0.mlp is quantized. Load the base with it in skip_modules"):
        Lora(settings).inject(load_base(source, "nf4"))
    model = load_base(source, "nf4", skip_modules=["mlp"])
    Lora(settings).inject(model)
    assert sum(name.endswith("_proj.weight") for name in trainable_parameters(model)) == 6
