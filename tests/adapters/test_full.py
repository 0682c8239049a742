"""Full fine-tuning: every weight trained, a tied one once, stored and loaded to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, VOCAB_SIZE, save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.full import Full
from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import FullSettings
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base


def logits(model: Any) -> torch.Tensor:
    return model.eval()(tiny_ids()).logits


def changed(model: Any) -> Full:
    method = Full(FullSettings())
    assert method.inject(model) == []
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return method


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_is_trained_stored_and_loaded(tmp_path: Path, arch: str, tied: bool) -> None:
    model = tiny_model(arch, tie_word_embeddings=tied)
    method = changed(model)
    names = {name for name, _ in model.named_parameters()}
    assert trainable_parameters(model).keys() == names
    plain = tiny_model(arch, tie_word_embeddings=tied)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        logits(each).square().mean().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-8)
    save_adapter(model, method, tmp_path, "tiny")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{name}" for name in names}
    again = tiny_model(arch, tie_word_embeddings=tied)
    assert isinstance(load_adapter(again, tmp_path), Full)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_make_the_loaded_model_larger(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    names = ["model.embed_tokens", "lm_head"]  # as training with adapter.new_tokens asks for
    method = Full(FullSettings().model_copy(update={"modules_to_save": names}))
    method.inject(model)
    save_adapter(model, method, tmp_path, "tiny")
    again = tiny_model("llama", tie_word_embeddings=tied)
    load_adapter(again, tmp_path)
    assert logits(again).shape[-1] == VOCAB_SIZE + 3 and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_base_is_refused(tmp_path: Path, quant: str) -> None:
    save_tiny_model(tmp_path / "base")
    model = load_base(find_base(str(tmp_path / "base")), quant)
    with pytest.raises(AdapterError, match=r"quantized codes cannot be trained.*base\.quant=none.*lora"):
        Full(FullSettings()).inject(model)


def test_fp16_is_trained_in_fp32(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    model = load_base(find_base(str(tmp_path / "base")), "none", compute_dtype=torch.float16)
    Full(FullSettings()).inject(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.float32


def test_merged_is_itself(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    model = load_base(find_base(str(tmp_path / "base")), "none", compute_dtype=torch.float32)
    changed(model)
    before = logits(model)
    assert merge_adapter(model) == []
    assert torch.equal(logits(model), before)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, changed(model), tmp_path, "tiny")
    with pytest.raises(AdapterError, match=r"tensor base_model\.model\.transformer.* is missing"):
        load_adapter(tiny_model("gpt2"), tmp_path)
