"""One owner of codes and statistics: bitsandbytes' values, and the same bytes after whatever is done with a model."""

from __future__ import annotations

import copy
import hashlib

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as F
from tiny_models import save_tiny_model, tiny_ids
from torch import nn

from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import save_adapter
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import ModelError
from qlora_kit.model.int4_blocks import Int4Grid, quantize_int4
from qlora_kit.model.load import load_base
from qlora_kit.model.quantized import QuantizedLinear, expanded, own_quantized_layers
from qlora_kit.model.source import find_base

SIZES = [(64, 33), (100, 7), (13, 11), (96, 257), (1, 1), (64, 256), (129, 128)]  # in, out
FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
KINDS = [*FOUR_BIT, ("int8", False)]


def bnb_layer(fan_in: int, fan_out: int, quant: str, double: bool = False, bias: bool = True) -> nn.Module:
    """bitsandbytes' own layer, quantized from random weights, never run."""
    generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)
    weight = torch.randn(fan_out, fan_in, generator=generator)
    layer: nn.Module
    if quant == "int8":
        layer = bnb.nn.Linear8bitLt(fan_in, fan_out, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(fan_in, fan_out, bias=bias, quant_type=quant, compress_statistics=double)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=quant, compress_statistics=double)
    return layer.to("cpu")


def bnb_weight(layer: nn.Module) -> torch.Tensor:
    """The expanded weight by bitsandbytes' own functions, fp32."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    state = copy.deepcopy(layer.weight.quant_state)
    state.dtype, shape = torch.float32, state.shape
    state.shape = torch.Size((shape.numel(),))  # as one row: its rows of 2-D weights are right in whole blocks only
    return F.dequantize_4bit(layer.weight.data, state).view(shape)


def fingerprint(model: nn.Module) -> str:
    """One hash over every buffer of every quantized layer: names, dtypes, shapes, bytes."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            for key, buffer in module.named_buffers():
                digest.update(f"{name}.{key} {buffer.dtype} {tuple(buffer.shape)}".encode())
                digest.update(buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(params=[*KINDS, ("int4", False)], ids=lambda kind: f"{kind[0]}{'-double' * kind[1]}")
def model(request, tiny_llama):
    quant, double = request.param
    model = load_base(find_base(str(tiny_llama)), quant, double, torch.float32)
    Lora(LoraSettings(rank=2, alpha=4.0, dtype="fp32")).inject(model)
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapted_layers(model):
        layer.lora_B.data.normal_(0, 0.05, generator=generator)
    return model


@pytest.mark.parametrize("quant,double", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dequantize_gives_bitsandbytes_own_bits(size, quant, double):
    layer = bnb_layer(*size, quant, double)
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile for odd rows
        wanted = bnb_weight(layer)
    ours = QuantizedLinear.from_bitsandbytes(layer)
    assert torch.equal(ours.dequantize(torch.float32), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = ours.dequantize(dtype)
        assert narrow.dtype == dtype
        assert torch.equal(narrow, wanted.to(dtype))
    x = torch.randn(3, size[0])
    torch.testing.assert_close(ours(x), nn.functional.linear(x, wanted, layer.bias))


@pytest.mark.parametrize("fan_in", [16, 48, 64, 96, 100, 160, 176])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_rows_that_share_blocks_are_expanded_right(fan_in, quant):
    layer = QuantizedLinear.from_bitsandbytes(bnb_layer(fan_in, 37, quant))
    pairs = torch.stack([layer.codes.flatten() >> 4, layer.codes.flatten() & 15], 1)
    wanted = layer.code[pairs.flatten().long()] * layer.absmax.repeat_interleave(64)[: 37 * fan_in]
    # The fast path holds its own table of codes, fp4's to four digits.
    torch.testing.assert_close(layer.dequantize(torch.float32).flatten(), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("quant,bound", [("nf4", 0.16), ("fp4", 0.2), ("int8", 0.005)])
def test_the_weight_is_near_what_was_quantized(quant, bound):
    generator = torch.Generator().manual_seed(100 * 1000 + 37)
    weight = torch.randn(37, 100, generator=generator)
    ours = QuantizedLinear.from_bitsandbytes(bnb_layer(100, 37, quant))
    error = (ours.dequantize(torch.float32) - weight).abs()
    scale = weight.abs().amax(1, keepdim=True) if quant == "int8" else weight.abs().max()
    assert 0 < (error / scale).max() < bound


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = tiny_ids()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_nothing_changes_codes_or_statistics(model, tmp_path):
    before, first = fingerprint(model), train_step(model)
    with torch.no_grad():
        logits = model.eval()(tiny_ids()).logits
    settings = LoraSettings(rank=2, alpha=4.0, dtype="fp32")
    model.generate(tiny_ids(rows=1), max_new_tokens=4, do_sample=False)
    assert fingerprint(model) == before
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(tiny_ids())
    with expanded(model, torch.float32):
        model.generate(tiny_ids(rows=1), max_new_tokens=2, do_sample=False)
    save_adapter(model, Lora(settings), tmp_path, "tiny")
    assert set(model.state_dict()) >= {"model.layers.0.mlp.up_proj.base_layer.codes"}
    second = train_step(model)
    assert fingerprint(model) == before
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)  # gradients after an evaluation
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny_ids()).logits, logits)
        assert torch.equal(model.train()(tiny_ids()).logits, logits)  # int8 too: no activation is rounded


def test_the_input_gets_a_gradient_also_after_an_evaluation(model):
    layer = next(adapted_layers(model))[1].base_layer
    x = torch.randn(4, layer.in_features, requires_grad=True)
    with torch.no_grad():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(4, -1))


def test_gradient_checkpointing_gives_the_same_bits(model):
    wanted = train_step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = train_step(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [Int4Grid(), Int4Grid(128, "rtn")], ids=str)
def test_loaded_int4_layers_hold_the_blocks_of_the_weights(tmp_path, arch, dtype, grid):
    source = find_base(str(save_tiny_model(tmp_path, arch)))
    plain = load_base(source, "none", compute_dtype=dtype)
    model = load_base(source, "int4", compute_dtype=dtype, grid=grid)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == (14 if arch == "qwen2" else 8)
    for name, layer in layers:
        whole = plain.get_submodule(name)
        weight = whole.weight.detach().T if arch == "gpt2" else whole.weight.detach()  # Conv1D stores [in, out]
        wanted = quantize_int4(weight, grid)
        assert all(torch.equal(found, tensor) for found, tensor in zip(layer.int4_blocks, wanted, strict=True))
        assert layer.block_size == grid.block_size and layer.quant == "int4"
        assert (layer.bias is None) == (whole.bias is None)
        assert whole.bias is None or torch.equal(layer.bias, whole.bias)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("double,statistics", [(True, 128 + 4 * (1 + 256 + 1)), (False, 4 * 128)])
def test_stored_bytes_count_codes_and_statistics(double, statistics):
    layer = QuantizedLinear.from_bitsandbytes(bnb_layer(64, 128, "nf4", double))  # 128 blocks, 16 code values
    assert layer.stored_bytes() == 64 * 128 // 2 + 4 * 16 + statistics
    assert "64, 128, quant=nf4" in repr(layer)


def test_casting_a_model_spares_the_statistics(model):
    before = fingerprint(model)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        cast(model)
        assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before


def test_state_dict_round_trip(model):
    other = copy.deepcopy(model)
    for buffer in other.buffers():
        buffer.zero_()
    assert fingerprint(other) != fingerprint(model)
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) == fingerprint(model)


def test_expanded_gives_the_same_bits_and_lets_go(model):
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    with torch.no_grad():
        wanted = model.eval()(tiny_ids()).logits
        with expanded(model, torch.float32):
            kept = [layer.dequantize(torch.float32) for layer in layers]
            assert all(layer.dequantize(torch.float32) is weight for layer, weight in zip(layers, kept))
            assert layers[0].dequantize(torch.bfloat16).dtype == torch.bfloat16
            assert torch.equal(model(tiny_ids()).logits, wanted)
            with expanded(model, torch.float32):
                pass
            assert layers[0].dequantize(torch.float32) is kept[0]  # the outer block still holds
    assert all(layer.kept is None for layer in layers)
    with pytest.raises(KeyError), expanded(model, torch.float32):
        raise KeyError
    assert all(layer.kept is None for layer in layers)
    assert "kept" not in model.state_dict()


@pytest.mark.skipif(not F.has_avx512bf16(), reason="bitsandbytes repacks only where the CPU has AVX512-BF16")
def test_the_trap_is_real_and_a_repacked_layer_is_refused():
    layer = bnb_layer(64, 64, "nf4", double=True, bias=False).eval()
    codes, x = layer.weight.data.clone(), torch.randn(2, 64)
    wanted = bnb_weight(layer)
    own = QuantizedLinear.from_bitsandbytes(copy.deepcopy(layer)).eval()
    with torch.no_grad():
        layer(x)
        own(x)
    assert layer.weight.data.shape != codes.shape or not torch.equal(layer.weight.data, codes)
    assert torch.equal(own.dequantize(torch.float32), wanted)
    with pytest.raises(ModelError, match="repacked by bitsandbytes' own forward"):
        own_quantized_layers(nn.Sequential(layer))


def test_layers_without_statistics_are_refused():
    fresh = bnb.nn.Linear4bit(8, 8)
    with pytest.raises(ModelError, match="never quantized"):
        QuantizedLinear.from_bitsandbytes(fresh)
    run = bnb_layer(16, 16, "int8")
    run(torch.randn(2, 16))
    with pytest.raises(ModelError, match="never quantized or was run"):
        QuantizedLinear.from_bitsandbytes(run)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
@pytest.mark.parametrize("quant,double", KINDS)
def test_loaded_layers_hold_what_bitsandbytes_makes_of_the_weights(tmp_path, arch, quant, double):
    source = find_base(str(save_tiny_model(tmp_path, arch)))
    plain = load_base(source, "none", compute_dtype=torch.float32)
    model = load_base(source, quant, double, torch.float32)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == (14 if arch == "qwen2" else 8)
    for name, layer in layers:
        weight = plain.get_submodule(name).weight.detach()
        weight = weight.T.contiguous() if arch == "gpt2" else weight  # Conv1D stores [in, out]
        if quant == "int8":
            codes, absmax, _ = F.int8_vectorwise_quant(weight.half())
            wanted = F.int8_vectorwise_dequant(codes, absmax)
        else:
            codes, state = F.quantize_4bit(weight, quant_type=quant, compress_statistics=double)
            wanted = F.dequantize_4bit(codes, state)
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.dequantize(torch.float32), wanted)
        bias = plain.get_submodule(name).bias
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
