"""BitFit: which weights are trained, what is stored, and that trained biases survive a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.bitfit import BitFit
from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import BitFitSettings
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base, to_reference
from qlora_kit.model.source import find_base


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(tiny_ids()).logits


@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "gpt_neox", "phi"])
def test_all_biases_and_nothing_else(arch: str) -> None:
    model = tiny_model(arch)
    wanted = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    BitFit(BitFitSettings()).inject(model)
    assert trainable_parameters(model).keys() == wanted
    plain = tiny_model(arch)
    for each in (model, plain):
        logits(each).square().mean().backward()
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-8)


def test_a_base_without_biases_is_refused() -> None:
    match = "LlamaForCausalLM has no biases to train.*lora, dora, bottleneck, prompt_tuning"
    for saved in ([], ["lm_head"]):
        with pytest.raises(AdapterError, match=match):
            BitFit(BitFitSettings(modules_to_save=saved)).inject(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
def test_stored_loaded_and_merged(tmp_path: Path, arch: str, quant: str, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path / "base", arch)
    base = find_base(str(tmp_path / "base"))
    model = load_base(base, quant, compute_dtype=dtype)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("bias")}
    method = BitFit(BitFitSettings())
    method.inject(model)
    trained = trainable_parameters(model)
    for parameter in trained.values():
        assert parameter.dtype == (torch.float32 if dtype == torch.float16 else dtype)  # fp16 holds no updates
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    save_adapter(model, method, tmp_path / "adapter", "tiny")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{name}" for name in trained}
    again = load_base(base, quant, compute_dtype=dtype)
    before = logits(again)
    assert isinstance(load_adapter(again, tmp_path / "adapter"), BitFit)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), before)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) or "norm" in name or "ln_" in name for name, value in frozen.items())
    learned = logits(to_reference(again)).detach()
    assert merge_adapter(again) == []
    torch.testing.assert_close(logits(again), learned, rtol=0, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model, method = tiny_model("qwen2"), BitFit(BitFitSettings())
    method.inject(model)
    save_adapter(model, method, tmp_path, "tiny")
    with pytest.raises(AdapterError, match=r"tensor base_model\.model.*bias is missing"):
        load_adapter(tiny_model("gpt2"), tmp_path)
