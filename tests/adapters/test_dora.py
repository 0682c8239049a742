"""DoRA in a model, and against PEFT's: logits, gradients, files both ways."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from adapted_models import logits, randomize
from tiny_models import save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.dora import Dora, DoraLinear
from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import DoraSettings
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

SETTINGS = DoraSettings(rank=3, alpha=7.0, dtype="fp32")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_ours_in_peft_and_back(tmp_path: Path, arch: str) -> None:
    ours = tiny_model(arch)
    before = logits(ours)
    method = Dora(SETTINGS)
    method.inject(ours)
    torch.testing.assert_close(logits(ours), before, rtol=0, atol=1e-5)
    randomize(ours)
    assert (logits(ours) - before).abs().max() > 0.1
    save_adapter(ours, method, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    same_gradients(ours, theirs.base_model.model)
    again = tiny_model(arch)
    assert isinstance(load_adapter(again, tmp_path), Dora)
    assert torch.equal(logits(again), logits(ours))


def same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for model in (ours, theirs):
        model(tiny_ids(), labels=tiny_ids()).loss.backward()
    found = {name.replace(".default", "").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in trainable_parameters(ours).items():
        other = found[name.replace("lora_magnitude", "lora_magnitude_vector")]
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_pefts_here_merged_alike(tmp_path: Path, quant: str) -> None:
    save_tiny_model(tmp_path / "base")
    base = find_base(str(tmp_path / "base"))
    plain = load_base(base, quant, compute_dtype=torch.float32)
    merge_adapter(plain)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain, config)
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_base(base, quant, compute_dtype=torch.float32)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    before = logits(ours)
    merge_adapter(ours)
    assert not list(adapted_layers(ours))
    torch.testing.assert_close(logits(ours), before, rtol=0, atol=1e-5)


def test_training_it_makes_no_copy_of_the_weight_in_fp32(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    model = load_base(find_base(str(tmp_path / "base")), "nf4", compute_dtype=torch.bfloat16)
    method = Dora(SETTINGS.model_copy(update={"dtype": "bf16"}))
    method.inject(model)
    asked: list[torch.dtype] = []
    for _, layer in adapted_layers(model):
        assert isinstance(layer, DoraLinear) and layer.lora_magnitude.dtype == torch.float32
        base, expand = layer.base_layer, layer.base_layer.dequantize
        base.dequantize = lambda dtype, expand=expand: asked.append(dtype) or expand(dtype)  # type: ignore[method-assign]
    model.train()(tiny_ids(), labels=tiny_ids()).loss.backward()
    assert set(asked) == {torch.bfloat16}
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


def test_a_row_of_zeros_merges(tmp_path: Path) -> None:
    model = tiny_model("qwen2", pad_token_id=2)
    model.lm_head.weight.data[2] = 0
    Dora(SETTINGS.model_copy(update={"target_modules": ["lm_head"], "dropout": 0.1})).inject(model)
    loss = model.train()(tiny_ids(), labels=tiny_ids()).loss
    loss.backward()
    assert torch.isfinite(loss)
    before = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
