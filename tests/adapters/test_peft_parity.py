"""PEFT's format both ways: the same logits to 1e-5 in fp32, on an unquantized and on a dequantized base."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import assert_same_gradients, logits
from tiny_models import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

SETTINGS = LoraSettings(rank=3, alpha=7.0, dtype="fp32")
CASES = {
    "plain": ("llama", True, {}),
    "rslora": ("llama", False, {"use_rslora": True, "rank": 5}),
    "listed": ("qwen2", False, {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
    "regex": ("qwen3", False, {"target_modules": r"model\.layers\.0\..*_proj"}),
    "regex to the head": ("mistral", False, {"target_modules": r".*(v_proj|lm_head)"}),
    "tied head as target": ("llama", True, {"target_modules": ["q_proj", "lm_head"]}),
    "norm in full": ("llama", False, {"modules_to_save": ["norm"]}),
    "untied head in full": ("llama", False, {"modules_to_save": ["lm_head"]}),
    "tied head in full": ("llama", True, {"modules_to_save": ["lm_head"]}),
    "mlp in full": ("llama", False, {"modules_to_save": ["layers.1.mlp"]}),
    "bias all": ("qwen2", False, {"bias": "all"}),
    "bias lora_only": ("qwen2", False, {"bias": "lora_only"}),
    "conv1d": ("gpt2", True, {}),
    "conv1d, bias all": ("gpt2", True, {"bias": "all", "target_modules": ["c_attn"]}),
    "fused": ("phi3", False, {}),
    "gemma": ("gemma2", True, {}),
    "neox": ("gpt_neox", False, {"bias": "all"}),
}


def randomize(model: torch.nn.Module, names: list[str] | None = None) -> None:
    """Values that show in the logits, for everything trained."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if names is None else name in names:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def assert_same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(logits(one), logits(other), rtol=0, atol=1e-5)


def quantized_base(folder: Path, quant: str, skip: list[str] | None = None) -> PreTrainedModel:
    return load_base(find_base(str(folder)), quant, compute_dtype=torch.float32, skip_modules=skip)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same weights, by the path that export takes."""
    merge_adapter(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_ours_in_peft_and_back(tmp_path, case):
    arch, tie, changes = CASES[case]
    ours = tiny_model(arch, tie_word_embeddings=tie)
    before = logits(ours)
    settings = SETTINGS.model_copy(update=changes)
    Lora(settings).inject(ours)
    assert torch.equal(logits(ours), before)  # B is zero: an untouched adapter changes nothing, to the bit
    randomize(ours)
    assert (logits(ours) - before).abs().max() > 0.1
    save_adapter(ours, Lora(settings), tmp_path, "tiny")

    theirs = peft.PeftModel.from_pretrained(
        tiny_model(arch, tie_word_embeddings=tie), str(tmp_path), is_trainable=True
    ).eval()
    assert_same_logits(theirs, ours)
    assert_same_gradients(ours, theirs)
    wrapped = {name for name, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert wrapped == {name for name, _ in adapted_layers(ours)}

    again = tiny_model(arch, tie_word_embeddings=tie)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert trainable_parameters(again).keys() == trainable_parameters(ours).keys()
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["lora_alpha"] == 7
    assert isinstance(stored["lora_alpha"], int)


PEFT_CASES = {
    "plain": ("llama", True, {"target_modules": "all-linear"}),
    "rslora": ("llama", False, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "regex": ("qwen2", False, {"target_modules": r".*\.1\.mlp\..*_proj"}),
    "some layers": ("llama", False, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "all but some": ("llama", False, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "head": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied head trained apart": ("llama", True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, both copies": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "loose name": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "tied, embedding alone": ("llama", True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "bias all": ("qwen2", False, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", False, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "conv1d": ("gpt2", True, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "conv1d, bias all": ("gpt2", True, {"target_modules": ["c_proj"], "fan_in_fan_out": True, "bias": "all"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_pefts_here(tmp_path, case):
    arch, tie, options = PEFT_CASES[case]
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(tiny_model(arch, tie_word_embeddings=tie), config)
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_model(arch, tie_word_embeddings=tie)
    load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False])
def test_pefts_with_resized_embeddings(tmp_path, tie):
    save_tiny_model(tmp_path / "base", tie=tie)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(333)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = load_adapter(ours, tmp_path / "adapter").settings
    assert logits(ours).shape[-1] == 333
    assert_same_logits(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie
    save_adapter(ours, Lora(settings), tmp_path / "ours", "tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_both_ways_on_the_dequantized_base(tmp_path, arch, quant):
    save_tiny_model(tmp_path / "base", arch)
    plain = dequantized(quantized_base(tmp_path / "base", quant)).eval()
    assert_same_logits(plain, quantized_base(tmp_path / "base", quant))

    ours = quantized_base(tmp_path / "base", quant)
    Lora(SETTINGS).inject(ours)
    randomize(ours)
    save_adapter(ours, Lora(SETTINGS), tmp_path / "ours", "tiny")
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours"))
    assert_same_logits(theirs, ours)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = quantized_base(tmp_path / "base", quant)
    load_adapter(again, tmp_path / "theirs")
    assert_same_logits(again, theirs)


@pytest.mark.parametrize("tie", [True, False])
def test_new_tokens_in_ours_load_in_peft(tmp_path, tie):
    save_tiny_model(tmp_path / "base", tie=tie)
    names = ["model.embed_tokens", "lm_head"]
    settings = SETTINGS.model_copy(update={"modules_to_save": names})
    ours = quantized_base(tmp_path / "base", "nf4", names)
    ours.resize_token_embeddings(327)
    Lora(settings).inject(ours)
    randomize(ours)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie
    save_adapter(ours, Lora(settings), tmp_path / "adapter", "tiny")

    plain = dequantized(quantized_base(tmp_path / "base", "nf4"))
    plain.resize_token_embeddings(327)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert_same_logits(theirs, ours)
    again = quantized_base(tmp_path / "base", "nf4", names)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("rank,alpha,rslora", [(1, 1.0, False), (7, 3.5, False), (7, 3.5, True), (16, 32.0, True)])
def test_scaling_is_pefts_to_the_bit(rank, alpha, rslora):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj"])
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    assert LoraSettings(rank=rank, alpha=alpha, use_rslora=rslora).scaling == layer.scaling["default"]


def test_a_merged_model_keeps_the_delta_of_a_tied_head(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    Lora(SETTINGS.model_copy(update={"target_modules": ["lm_head"]})).inject(model)
    randomize(model)
    wanted = logits(model)
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, rtol=0, atol=1e-5)
