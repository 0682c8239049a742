"""A head held as codes: the model is the one with the dequantized head, to the bit, in memory and from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_ids

from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.generate import generate_greedily
from qlora_kit.model.cache import kept_models
from qlora_kit.model.load import load_base, load_tokenizer, to_reference
from qlora_kit.model.quantize import Quantization
from qlora_kit.model.quantized import QuantizedLinear, expanded
from qlora_kit.model.quantized_head import (
    CodedEmbedding,
    coded_head,
    expand_piece,
    expand_rows,
    quantize_head,
    vocabulary_pieces,
)
from qlora_kit.model.source import BaseSource, find_base

KINDS = ["int8", "nf4"]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))


def coded(source: BaseSource, head: str, quant: str = "nf4", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    return load_base(source, quant, compute_dtype=dtype, head_quant=head, **more)


def logits_with_dequantized_head(source: BaseSource, model: Any, quant: str, dtype: torch.dtype) -> torch.Tensor:
    """Of the same base, unquantized head and embedding, whose weight the dequantized head is."""
    plain: Any = load_base(source, quant, compute_dtype=dtype)
    plain.get_output_embeddings().weight.data = model.get_output_embeddings().dequantize(dtype)
    logits: torch.Tensor = plain(tiny_ids()).logits
    return logits


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_computes_with_the_dequantized_head(tmp_path: Path, arch: str, tie: bool) -> None:
    source = find_base(str(save_tiny_model(tmp_path / "model", arch, tie)))
    model = coded(source, "int8")
    assert isinstance(model.get_input_embeddings(), CodedEmbedding) == tie
    expected = logits_with_dequantized_head(source, model, "nf4", torch.bfloat16)
    assert torch.equal(model(tiny_ids()).logits, expected)
    again = [coded(source, "int8", cache=True) for _ in range(2)][1]
    assert len(kept_models()) == 1 and torch.equal(again(tiny_ids()).logits, expected)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert to_reference(again)(tiny_ids()).logits.dtype == torch.float32


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("quant", ["none", "fp4", "int8", "int4"])
@torch.no_grad()
def test_it_stands_beside_every_base(tiny_llama: Path, quant: str, head: str) -> None:
    source = find_base(str(tiny_llama))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = coded(source, head, quant, dtype)
        assert torch.equal(model(tiny_ids()).logits, logits_with_dequantized_head(source, model, quant, dtype))
    whole = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    assert whole == (1 if quant == "none" else 15)
    assert not any(parameter.numel() >= 320 * 64 for parameter in model.parameters())  # nothing 16-bit of it stays


@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("shape", [(320, 64), (1003, 96), (101, 17), (64, 576)], ids=str)
def test_codes_are_bitsandbytes_and_parts_are_those_of_the_whole(shape: tuple[int, int], head: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    for double in (True, False):
        layer = quantize_head(weight, head, double, None)
        whole = Quantization(head, double).quantize(weight, None)
        for (name, ours), (_, theirs) in zip(layer.named_buffers(), whole.named_buffers(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        ids = torch.tensor([shape[0] - 1, 0, 3, 3, 7])
        for dtype in (torch.float32, torch.bfloat16):
            expected = layer.dequantize(dtype)
            assert torch.equal(expand_rows(layer, ids, dtype), expected[ids])
            parts = [expand_piece(layer, place, dtype) for place in vocabulary_pieces(layer, 9 * shape[1])]
            assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("head", KINDS)
@torch.no_grad()
def test_answers_are_the_same_whether_its_weight_is_kept_expanded(tiny_llama: Path, head: str) -> None:
    source = find_base(str(tiny_llama))
    model, tokenizer = coded(source, head), load_tokenizer(source.folder)
    prompts = [[5, 9, 13], [40, 41, 42, 43]]
    logits = model(tiny_ids()).logits
    with expanded(model, torch.bfloat16):
        assert torch.equal(model(tiny_ids()).logits, logits)
        kept = list(generate_greedily(model, tokenizer, prompts, 6))
    assert list(generate_greedily(model, tokenizer, prompts, 6)) == kept


def test_a_stored_model_keeps_its_head_and_says_so(tiny_llama: Path) -> None:
    coded(find_base(str(tiny_llama)), "int8", cache=True)
    source = find_base(str(kept_models()[0].folder))
    with pytest.raises(ModelError, match=r"stored with its head as int8.*got 'none'.*Set base.head_quant=int8"):
        load_base(source, "nf4")
    with pytest.raises(ModelError, match=r"got 'nf4'.*Allowed: int8"):
        coded(source, "nf4")
    assert coded_head(coded(source, "int8")) is not None


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_codes_are_not_trained(tiny_llama: Path, field: str, name: str) -> None:
    model = coded(find_base(str(tiny_llama)), "int8")
    if (field, name) == ("target_modules", "embed_tokens"):
        with pytest.raises(AdapterError, match="matches no layer"):
            Lora(LoraSettings(target_modules=[name])).inject(model)
        return
    with pytest.raises(AdapterError, match=rf"{field}: .*{name}.*is held as codes.*Set base.head_quant=none"):
        Lora(LoraSettings(**{field: [name]})).inject(model)


def test_files_that_are_not_tied_as_the_configuration_says_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tie=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"ties head and embedding, and the files hold other weights"):
        coded(find_base(str(folder)), "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert isinstance(coded(find_base(str(folder)), "int8").get_input_embeddings(), CodedEmbedding)


def test_weights_that_are_missing_are_still_missed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tie=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor lm_head.weight is missing"):
        coded(find_base(str(folder)), "int8")
