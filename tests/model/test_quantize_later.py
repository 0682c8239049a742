"""A base loaded whole and quantized afterwards: the codes and statistics that loading it quantized gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.load import load_base
from qlora_kit.model.quantize import Quantization, planned_quantization, quantize_planned
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False), ("int4", False)]


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("quant, double", KINDS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_bytes_of_a_quantized_loading(tmp_path: Path, arch: str, quant: str, double: bool) -> None:
    base = find_base(str(save_tiny_model(tmp_path, arch)))
    for dtype in (torch.float32, torch.bfloat16):
        wanted = load_base(base, quant, double, dtype)
        model = load_base(base, quant, double, dtype, quantize_later=True)
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        quantize_planned(model, [])
        assert_same_tensors(model, wanted)


@pytest.mark.parametrize("skip", [["lm_head"], ["layers.1"], ["q_proj", "embed_tokens", "lm_head"]])
def test_what_is_skipped_stays_whole(tmp_path: Path, skip: list[str]) -> None:
    base = find_base(str(save_tiny_model(tmp_path)))
    model = load_base(base, "nf4", skip_modules=skip, quantize_later=True)
    quantize_planned(model, [])
    assert_same_tensors(model, load_base(base, "nf4", skip_modules=skip))


def test_a_spared_layer_stays_whole(tiny_llama: Path) -> None:
    model = load_base(find_base(str(tiny_llama)), "nf4", quantize_later=True)
    names = planned_quantization(model).names
    spared = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    quantize_planned(model, spared)
    whole = {name for name in names if isinstance(model.get_submodule(name), nn.Linear)}
    assert whole == set(spared) and len(names) == 14


@pytest.mark.parametrize("size", [(33, 64), (11, 13), (1, 1), (7, 100)], ids=str)
@pytest.mark.parametrize("quant, double", KINDS)
def test_odd_sizes_and_the_same_bias(size: tuple[int, int], quant: str, double: bool) -> None:
    weight, bias = torch.randn(size, generator=torch.Generator().manual_seed(0)), nn.Parameter(torch.zeros(size[0]))
    layer = Quantization(quant, double).quantize(weight.clone(), bias)
    assert layer.bias is bias and (layer.out_features, layer.in_features) == size
    again = Quantization(quant, double).quantize(weight.T.contiguous().T, None)
    for name, buffer in layer.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    step = {"nf4": 0.16, "fp4": 0.2, "int8": 0.005, "int4": 0.3}[quant] * weight.abs().max()
    assert (layer.dequantize(torch.float32) - weight).abs().max() <= step


def test_a_model_that_no_one_planned_for_stays_as_it_is() -> None:
    model = tiny_model("llama")
    assert planned_quantization(model) == Quantization("none")
    quantize_planned(model, [])
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_quantized_model_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"is quantized already.*quantize_later=True"):
        planned_quantization(load_base(find_base(str(tiny_llama)), "nf4"))


def test_no_layer_to_quantize_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="no linear layer to quantize"):
        load_base(find_base(str(tiny_llama)), "nf4", skip_modules=["layers"], quantize_later=True)
