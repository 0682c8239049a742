"""QA-LoRA against the paper's pooled form, in values and gradients; its delta by groups, its way to LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import logits, randomize
from tiny_models import save_tiny_model, tiny_model
from torch import Tensor

from qlora_kit.adapter_tools.converting import convert
from qlora_kit.adapter_tools.sources import open_source
from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.qa_lora import QaLora, QaLoraLinear, qa_lora_reference
from qlora_kit.adapters.settings import QaLoraSettings
from qlora_kit.adapters.to_lora import convert_to_lora
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.int4_blocks import Int4Grid, quantize_int4
from qlora_kit.model.load import load_base
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base

SETTINGS = QaLoraSettings(rank=4, alpha=7.0, dtype="fp32", rank_pattern={"q_proj": 3}, use_rslora=True)
SIZES = [(64, 33), (100, 7), (13, 11), (300, 64), (129, 128)]  # in, out
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def layer_of(fan_in: int, fan_out: int, settings: QaLoraSettings, block_size: int = 32) -> QaLoraLinear:
    torch.manual_seed(fan_in)
    blocks = quantize_int4(torch.randn(fan_out, fan_in) * 0.1, Int4Grid(block_size, "rtn"))
    base = QuantizedLinear.from_int4(blocks, fan_in, torch.nn.Parameter(torch.randn(fan_out)))
    layer = QaLoraLinear(base, settings)
    layer.lora_B.data.normal_(0, 0.1)
    return layer


def results(y: Tensor, x: Tensor, layer: QaLoraLinear) -> list[Tensor]:
    """The output, and the gradients of input, A, B and bias."""
    inputs = [x, layer.lora_A, layer.lora_B, layer.bias]
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_pooled_form(
    size: tuple[int, int], group_size: Any, dtype: torch.dtype
) -> None:
    layer = layer_of(*size, SETTINGS.model_copy(update={"group_size": group_size}))
    assert layer.lora_A.shape == (4, -(-size[0] // group_size))
    planned = SETTINGS.model_copy(update={"group_size": group_size}).layer_sizes("up_proj", *size)
    assert planned == [layer.lora_A.numel(), layer.lora_B.numel()]
    x = torch.randn(2, 3, size[0]).to(dtype).requires_grad_()
    found = results(layer(x), x, layer)
    pooled = qa_lora_reference(x, layer.expand, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, group_size)
    assert found[0].dtype == dtype
    for one, other in zip(found, results(pooled, x, layer), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCES[dtype] * scale)


def test_the_delta_is_constant_within_a_group() -> None:
    """So W + delta is scale · (code - zero point) with the codes as they are: zero points take the delta, as floats."""
    layer = layer_of(300, 64, SETTINGS)
    merged, delta = layer.merged()
    for first in range(0, 300, 32):
        group = delta[:, first : first + 32]
        assert torch.equal(group, group[:, :1].expand_as(group)) and group.abs().max() > 0
    base: Any = layer.base_layer
    codes, scales, zeros = base.int4_blocks
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(2).float()  # [out, blocks, 32]
    points = torch.stack([zeros & 15, zeros >> 4], -1).flatten(1)[:, : scales.shape[1]].float()
    moved = points - delta[:, ::32] / scales
    again = (scales[..., None] * (nibbles - moved[..., None])).flatten(1)[:, :300]
    torch.testing.assert_close(again, merged, rtol=0, atol=1e-5)


def test_it_starts_at_the_base_with_a_branch_as_large_as_loras() -> None:
    layer = layer_of(4096, 8, SETTINGS.model_copy(update={"rank": 64}))
    h = torch.randn(64, 4096) @ layer.widened.detach().T
    assert h.std().item() == pytest.approx((1 / 3) ** 0.5, rel=0.1)  # of uniform numbers within 1 / √in
    layer.lora_B.data.zero_()
    x = torch.randn(3, 4096)
    assert torch.equal(layer(x), layer.base_layer(x))


def tuned(folder: Path, settings: QaLoraSettings = SETTINGS) -> tuple[Any, QaLora]:
    model = int4_model(folder)
    method = QaLora(settings)
    method.inject(model)
    randomize(model)
    return model, method


def int4_model(folder: Path) -> Any:
    return load_base(find_base(str(save_tiny_model(folder / "base"))), "int4", compute_dtype=torch.float32)


@pytest.mark.parametrize("group_size", [32, 128])
def test_saved_loaded_merged_and_converted_it_computes_the_same(tmp_path: Path, group_size: Any) -> None:
    ours, method = tuned(tmp_path, SETTINGS.model_copy(update={"group_size": group_size}))
    wanted = logits(ours)
    assert (wanted - logits(int4_model(tmp_path))).abs().max() > 0.1
    save_adapter(ours, method, tmp_path / "qa", "tiny")
    again = int4_model(tmp_path)
    loaded = load_adapter(again, tmp_path / "qa")
    assert isinstance(loaded, QaLora) and loaded.settings.group_size == group_size
    assert torch.equal(logits(again), wanted)

    convert_to_lora(tmp_path / "qa", tmp_path / "lora")
    convert(open_source(tmp_path / "qa"), tmp_path / "converted")
    for folder in ("lora", "converted"):
        lora = int4_model(tmp_path)
        assert isinstance(load_adapter(lora, tmp_path / folder), Lora)
        assert torch.equal(logits(lora), wanted)
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and not {"group_size", "in_features"} & config.keys()
    merge_adapter(ours)
    assert not list(adapted_layers(ours))
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-5)


def test_other_bases_and_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"blocks of an int4 base \(got 'an unquantized layer'\).*base\.quant=int4"):
        QaLora(SETTINGS).inject(tiny_model("llama"))
    nf4 = load_base(find_base(str(save_tiny_model(tmp_path / "base"))), "nf4")
    with pytest.raises(AdapterError, match=r"int4 base \(got 'nf4'\)"):
        QaLora(SETTINGS).inject(nf4)
    with pytest.raises(AdapterError, match=r"adapter\.group_size \(got 32\)\. Allowed: multiples of .*block size, 64"):
        layer_of(64, 8, SETTINGS, block_size=64)


def test_a_damaged_group_size_is_named(tmp_path: Path) -> None:
    model, method = tuned(tmp_path)
    save_adapter(model, method, tmp_path / "qa", "tiny")
    file = tmp_path / "qa" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"group_size": 48}))
    with pytest.raises(AdapterError, match=r"group_size: input should be 32, 64 or 128"):
        load_adapter(int4_model(tmp_path), tmp_path / "qa")
