"""PiSSA and LoftQ: what the base loses and the adapter begins with, against PEFT's and against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import assert_same_gradients, randomize
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_ids, tiny_model
from torch import nn

from qlora_kit.adapter_tools.converting import convert
from qlora_kit.adapter_tools.sources import open_source
from qlora_kit.adapters.factors import best_factors
from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.layer import AdaptedLinear
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import LoftqSettings, LoraSettings, LowRankSettings, PissaSettings
from qlora_kit.adapters.svd_init import SUBTRACTED, Loftq, Pissa
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import BaseSource, find_base

PISSA = PissaSettings(rank=3, alpha=7.0, dtype="fp32", niter=0)
LOFTQ = LoftqSettings(rank=3, alpha=7.0, dtype="fp32", niter=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSource:
    return find_base(str(save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2")))


def whole(base: BaseSource, quant: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(base, quant, compute_dtype=dtype, quantize_later=True)


def injected(model: Any, settings: LowRankSettings) -> tuple[Any, Method[Any]]:
    torch.manual_seed(0)
    method = method_for(settings)
    method.inject(model)
    return model, method


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer to what its base and adapter make together, float32 [out, in]."""
    return {name: layer.merged()[0] for name, layer in adapted_layers(model) if isinstance(layer, AdaptedLinear)}


def weights_before(base: BaseSource, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return weights(injected(load_base(base, compute_dtype=dtype), LoraSettings(rank=1))[0])


def steep(arch: str) -> Any:
    """A model whose singular values fall, as those of trained weights do: its principal part is one and no other."""
    model = tiny_model(arch)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and (".layers." in name or ".h." in name):
            u, s, vh = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = u * (2 * s[0] * 0.6 ** torch.arange(len(s))) @ vh
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_ids()).logits.float()


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of every quantized layer by the layer's own name, adapted or not."""
    return {
        f"{name.removesuffix('.base_layer')}.{key}": buffer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for key, buffer in layer.named_buffers()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("niter", [0, 16])
def test_pissa_is_pefts(arch: str, niter: int) -> None:
    ours, _ = injected(steep(arch), PISSA.model_copy(update={"niter": niter}))
    torch.manual_seed(0)
    start = f"pissa_niter_{niter}" if niter else "pissa"
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=start, fan_in_fan_out=arch == "gpt2"
    )
    theirs = peft.get_peft_model(steep(arch), config).base_model.model
    torch.testing.assert_close(logits(ours), logits(steep(arch)), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    for model in (ours, theirs):
        model(tiny_ids(), labels=tiny_ids()).loss.backward()
    for name, layer in adapted_layers(ours):
        other = theirs.get_submodule(name)
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        sign = (layer.lora_A * a).sum(1).sign()[:, None]
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer.lora_A, sign * a, **close)
        torch.testing.assert_close(layer.lora_B.T, sign * b.T, **close)
        torch.testing.assert_close(layer.lora_A.grad, sign * a.grad, **close)
        torch.testing.assert_close(layer.lora_B.grad.T, sign * b.grad.T, **close)
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight, **close)


@pytest.mark.parametrize("size", [(7, 13), (64, 100), (33, 5)], ids=str)
@pytest.mark.parametrize("dtype, close", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_fast_factors_are_as_good_as_the_exact_ones(size: tuple[int, int], dtype: Any, close: float) -> None:
    torch.manual_seed(1)
    u, s, vh = torch.linalg.svd(torch.randn(size), full_matrices=False)
    s = s * 0.8 ** torch.arange(len(s))
    matrix = u * s @ vh
    for niter in (0, 16):
        settings = PISSA.model_copy(update={"niter": niter, "dtype": dtype})
        a, b = best_factors(matrix, settings)
        assert a.shape == (3, size[1]) and b.shape == (size[0], 3)
        left = (matrix - settings.scaling * b.float() @ a.float()).norm()
        assert left.item() == pytest.approx(s[3:].norm().item(), rel=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_on_a_whole_base_keeps_every_weight(base: BaseSource, dtype: torch.dtype) -> None:
    before, (model, _) = weights_before(base, dtype), injected(whole(base, "none", dtype), PISSA.model_copy(
        update={"dtype": "bf16"}))  # fmt: skip
    for name, weight in weights(model).items():  # A and B are rounded before they are subtracted
        scale = before[name].abs().max()
        assert (weight - before[name]).abs().max() <= scale * (1e-6 if dtype == torch.float32 else 2**-8), name


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("settings", [PISSA, LOFTQ], ids=lambda settings: settings.method)
def test_less_is_lost_than_by_quantization_alone(base: BaseSource, settings: LowRankSettings, quant: str) -> None:
    before = weights_before(base)
    plain = weights(injected(load_base(base, quant, compute_dtype=torch.float32), LoraSettings(rank=1))[0])
    for dtype in ("fp32", "bf16"):
        found = weights(injected(whole(base, quant), settings.model_copy(update={"dtype": dtype}))[0])
        for name, weight in before.items():
            assert (found[name] - weight).norm() < (plain[name] - weight).norm(), name


def test_loftq_by_hand(base: BaseSource) -> None:
    name, scaling = "model.layers.1.mlp.gate_proj", LOFTQ.scaling
    weight = load_base(base, compute_dtype=torch.float32).get_submodule(name).weight.detach()
    product = torch.zeros_like(weight)
    for iterations in (1, 2, 3):
        model, method = injected(whole(base, "nf4"), LOFTQ.model_copy(update={"iterations": iterations}))
        layer = model.get_submodule(name)
        assert torch.equal(codes(model)[f"{name}.codes"], layer.base_layer.codes)
        kept = method.subtracted
        assert bool(kept) == (iterations > 1)
        if kept:
            stored = scaling * kept[f"{name}.lora_B"] @ kept[f"{name}.lora_A"]
            torch.testing.assert_close(stored, product, rtol=0, atol=1e-3 * product.abs().max().item())
        base_weight = layer.base_layer.dequantize(torch.float32)
        u, s, vh = torch.linalg.svd(weight - base_weight, full_matrices=False)
        product = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close(layer.delta(), product, rtol=0, atol=1e-5)


def test_loftq_of_one_turn_leaves_the_plain_codes(base: BaseSource) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = injected(whole(base, "nf4", dtype), LOFTQ.model_copy(update={"iterations": 1}))
        assert_same(codes(model), codes(load_base(base, "nf4", compute_dtype=dtype)))


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("method, more", [("pissa", {}), ("loftq", {"iterations": 1}), ("loftq", {"iterations": 3})])
def test_stored_and_loaded_to_the_bit(
    tmp_path: Path, base: BaseSource, method: str, more: dict[str, Any], quant: str
) -> None:
    if (method, quant) == ("loftq", "none"):
        pytest.skip("refused")
    kind = {"pissa": PissaSettings, "loftq": LoftqSettings}[method]
    settings = kind(rank=4, target_modules=["q_proj", "down_proj", "lm_head"], rank_pattern={"q_proj": 2}, **more)
    model, made = injected(whole(base, quant, torch.bfloat16), settings)
    randomize(model)
    save_adapter(model, made, tmp_path, "tiny")
    torch.manual_seed(99)  # nothing is drawn again
    again = whole(base, quant, torch.bfloat16)
    assert isinstance(load_adapter(again, tmp_path), type(made))
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    tuned = logits(again.float())
    merge_adapter(again)
    torch.testing.assert_close(logits(again), tuned, rtol=0, atol=1e-3)


def test_a_tied_embedding_is_not_touched() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    wanted = logits(model)
    injected(model, PISSA.model_copy(update={"target_modules": ["lm_head"]}))
    assert torch.equal(model.get_input_embeddings().weight, before)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_loftq_on_a_head_that_is_not_quantized_starts_like_lora(base: BaseSource) -> None:
    model, _ = injected(whole(base, "nf4"), LOFTQ.model_copy(update={"target_modules": ["lm_head"]}))
    assert not model.lm_head.lora_B.any() and model.lm_head.lora_A.any()
    assert torch.equal(logits(model), logits(load_base(base, "nf4", compute_dtype=torch.float32)))


def test_peft_makes_the_same_base_again_on_a_whole_one(tmp_path: Path) -> None:
    ours, method = injected(tiny_model("llama"), PISSA)
    randomize(ours)
    save_adapter(ours, method, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)


def test_peft_refuses_a_loftq_adapter(tmp_path: Path, base: BaseSource) -> None:
    ours, method = injected(whole(base, "nf4"), LOFTQ)
    save_adapter(ours, method, tmp_path, "tiny")
    with pytest.raises(ValueError, match="loftq_config"):
        peft.PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path))


def test_loftq_converted_is_pefts_lora_on_the_dequantized_base(tmp_path: Path, base: BaseSource) -> None:
    ours, method = injected(whole(base, "nf4"), LOFTQ.model_copy(update={"iterations": 1}))
    save_adapter(ours, method, tmp_path / "loftq", "tiny")
    convert(open_source(tmp_path / "loftq"), tmp_path / "lora")
    plain = load_base(base, "nf4", compute_dtype=torch.float32)
    merge_adapter(plain)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "lora"), is_trainable=True).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert_same_gradients(ours, theirs)


def test_loftq_needs_a_quantized_base(base: BaseSource) -> None:
    with pytest.raises(AdapterError, match=r"base\.quant none loses nothing.*adapter\.method pissa or lora"):
        injected(whole(base, "none"), LOFTQ)


def test_a_base_that_is_quantized_already_is_refused(base: BaseSource) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        injected(load_base(base, "nf4"), PISSA)


def test_a_rank_that_a_layer_does_not_hold_is_refused(base: BaseSource) -> None:
    with pytest.raises(AdapterError, match=r"k_proj: rank.*got 33.*Allowed: 1 to 32.*rank_pattern"):
        injected(whole(base, "nf4"), PISSA.model_copy(update={"rank": 33}))


def saved(folder: Path, base: BaseSource) -> Path:
    model, method = injected(whole(base, "nf4"), PISSA)
    save_adapter(model, method, folder, "tiny")
    return folder


def test_without_what_was_subtracted_it_is_refused(tmp_path: Path, base: BaseSource) -> None:
    (saved(tmp_path, base) / SUBTRACTED).unlink()
    with pytest.raises(AdapterError, match="init_lora_weights changes the base's weights"):
        load_adapter(whole(base, "nf4"), tmp_path)


def test_another_adapters_subtraction_is_refused(tmp_path: Path, base: BaseSource) -> None:
    file = saved(tmp_path, base) / SUBTRACTED
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(name)}, file)
    with pytest.raises(AdapterError, match=rf"differ in {name}.*whole adapter folder"):
        load_adapter(whole(base, "nf4"), tmp_path)
    save_file(tensors | {f"{name}.lora_A": torch.zeros(2, 64)}, file)
    with pytest.raises(AdapterError, match=rf"shapes of {name}.*Allowed: \[\[3, 64\]"):
        load_adapter(whole(base, "nf4"), tmp_path)
    file.write_bytes(b"torn")
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(whole(base, "nf4"), tmp_path)


def test_the_start_is_named_as_peft_names_it(tmp_path: Path) -> None:
    for niter, name in ((0, "pissa"), (4, "pissa_niter_4")):
        model, method = injected(tiny_model("llama"), PISSA.model_copy(update={"niter": niter}))
        save_adapter(model, method, tmp_path, "tiny")
        assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == name
        again = load_adapter(tiny_model("llama"), tmp_path)
        assert isinstance(again, Pissa) and again.settings.niter == niter
    assert Lora.reads({"peft_type": "LORA", "init_lora_weights": True})
    assert Loftq.reads({"peft_type": "LORA", "init_lora_weights": "loftq"})
