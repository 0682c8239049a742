"""A PiSSA or LoftQ adapter written as ordinary LoRA: on the base that everyone has, here and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import LoftqSettings, LoraSettings, LowRankSettings, PissaSettings
from qlora_kit.adapters.to_lora import convert_to_lora
from qlora_kit.errors import AdapterError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_ids()).logits.float()


def trained(model: Any, settings: LowRankSettings, folder: Path) -> torch.Tensor:
    """Saves an adapter that learned something into `folder`, and returns the logits with it."""
    method = method_for(settings)
    method.inject(model)
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(trainable_parameters(model).items()):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, method, folder, "tiny")
    return logits(model)


PATTERNS = {"rank_pattern": {"q_proj": 5, "down_proj": 2}, "alpha_pattern": {"up_proj": 3.0}}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, PATTERNS, PATTERNS | {"use_rslora": True}], ids=str)
def test_pissa_on_the_whole_base_is_the_same_function(tmp_path: Path, more: dict[str, Any], dtype: Any) -> None:
    settings = PissaSettings(rank=3, alpha=7.0, dtype=dtype, modules_to_save=["norm"], **more)
    wanted = trained(tiny_model("llama"), settings, tmp_path / "pissa")
    assert (wanted - logits(tiny_model("llama"))).abs().max() > 0.1
    convert_to_lora(tmp_path / "pissa", tmp_path / "lora")
    ours = tiny_model("llama")
    assert isinstance(load_adapter(ours, tmp_path / "lora"), Lora)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora"))
    for model in (ours, theirs):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 6


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_on_a_quantized_base_it_differs_as_two_quantizations_do(tmp_path: Path, method: str) -> None:
    base = find_base(str(save_tiny_model(tmp_path / "base")))
    settings = {"pissa": PissaSettings, "loftq": LoftqSettings}[method](rank=4, dtype="fp32")
    model = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
    wanted = trained(model, settings, tmp_path / "own")
    convert_to_lora(tmp_path / "own", tmp_path / "lora")
    plain = load_base(base, "nf4", compute_dtype=torch.float32)
    lost = (logits(plain) - logits(load_base(base, "none", compute_dtype=torch.float32))).norm()
    load_adapter(plain, tmp_path / "lora")
    assert 0 < (logits(plain) - wanted).norm() < 2 * lost


def test_loftq_that_subtracted_nothing_is_exact_and_keeps_its_rank(tmp_path: Path) -> None:
    base = find_base(str(save_tiny_model(tmp_path / "base")))
    model = load_base(base, "nf4", quantize_later=True)
    wanted = trained(model, LoftqSettings(rank=4, iterations=1), tmp_path / "own")
    convert_to_lora(tmp_path / "own", tmp_path / "lora")
    plain = load_base(base, "nf4")
    assert load_adapter(plain, tmp_path / "lora").settings.rank == 4
    assert torch.equal(logits(plain), wanted)


def test_a_layer_of_which_nothing_was_subtracted_takes_zeros(tmp_path: Path) -> None:
    base = find_base(str(save_tiny_model(tmp_path / "base", tie=False)))
    model = load_base(base, "nf4", compute_dtype=torch.float32, quantize_later=True)
    settings = LoftqSettings(rank=4, iterations=2, target_modules=["lm_head", "q_proj"], dtype="fp32")
    trained(model, settings, tmp_path / "own")
    convert_to_lora(tmp_path / "own", tmp_path / "lora")
    plain: Any = load_base(base, "nf4", compute_dtype=torch.float32)
    load_adapter(plain, tmp_path / "lora")
    torch.testing.assert_close(plain.lm_head.merged()[0], model.lm_head.merged()[0], rtol=0, atol=1e-6)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    trained(tiny_model("llama"), LoraSettings(rank=2), tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"holds no PiSSA, LoftQ or QA-LoRA adapter \(got .Lora.\)"):
        convert_to_lora(tmp_path / "lora", tmp_path / "new")
    trained(tiny_model("llama"), PissaSettings(rank=2), tmp_path / "pissa")
    with pytest.raises(AdapterError, match="holds an adapter already"):
        convert_to_lora(tmp_path / "pissa", tmp_path / "lora")
