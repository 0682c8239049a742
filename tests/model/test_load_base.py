"""Base models of every architecture, loaded and trained for a step; folders that cannot be loaded."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.model.load import load_base, to_reference
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base

LAYERS = {"phi": 12, "phi3": 8, "gpt2": 8, "gpt_neox": 8}  # linear layers beside the head, of two blocks; else 14


def quantized_names(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("quant", ["nf4", "int8", "int4", "none"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_and_learns(tmp_path, arch, quant):
    source = find_base(str(save_tiny_model(tmp_path, arch)))
    model = load_base(source, quant, compute_dtype=torch.float32)
    assert len(quantized_names(model)) == (0 if quant == "none" else LAYERS.get(arch, 14))
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = tiny_ids()
    with torch.no_grad():
        base = model(ids).logits
        source_logits = tiny_model(arch, tie_word_embeddings=True)(ids).logits
    distance = (base - source_logits).abs().max().item()
    assert distance == 0 if quant == "none" else 0 < distance < (0.2 if quant == "int8" else 2.0)

    torch.manual_seed(0)
    Lora(LoraSettings(rank=4, alpha=8.0, dtype="fp32")).inject(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_that_is_not_quantized_has_the_compute_dtype(tiny_llama, dtype):
    model = load_base(find_base(str(tiny_llama)), "nf4", compute_dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        logits = model(tiny_ids()).logits
        assert logits.dtype == dtype
        wanted = to_reference(load_base(find_base(str(tiny_llama)), "nf4", compute_dtype=dtype))(tiny_ids()).logits
    assert wanted.dtype == torch.float32
    assert (logits - wanted).abs().max() < {torch.bfloat16: 0.1, torch.float16: 0.01, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize(
    "skip,left",
    [
        (None, 14),
        ([], 14),
        (["lm_head"], 14),
        (["down_proj"], 12),
        (["mlp"], 8),
        (["layers.0"], 7),
        (["model.layers.1.self_attn.q_proj"], 13),
        (["norm", "embed_tokens"], 14),
        (["proj"], 14),
    ],
    ids=str,
)
@pytest.mark.parametrize("tie", [True, False])
def test_skipped_modules_and_the_head_stay_as_they_are(tmp_path, skip, left, tie):
    source = find_base(str(save_tiny_model(tmp_path, tie=tie)))
    model = load_base(source, "nf4", compute_dtype=torch.float32, skip_modules=skip)
    assert len(quantized_names(model)) == left
    assert type(model.lm_head) is torch.nn.Linear
    plain = tiny_model("llama", tie_word_embeddings=tie)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name))


def test_two_loads_give_the_same_model(tiny_llama):
    one, other = (load_base(find_base(str(tiny_llama)), "nf4").state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
