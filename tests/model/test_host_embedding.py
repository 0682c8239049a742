"""Embeddings on the host: the bits of plain ones, and nothing of them on the device but the rows in use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import save_tiny_model, tiny_ids, tiny_model, tiny_tokenizer
from transformers.quantizers import AutoHfQuantizer

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.settings import LoraSettings, PromptTuningSettings
from qlora_kit.errors import ModelError, OutOfMemory
from qlora_kit.generate import generate_greedily
from qlora_kit.model.host_embedding import HostEmbedding, device_map, embedding_for_host, put_on_host, rows_in_use
from qlora_kit.model.load import load_base
from qlora_kit.model.loader import quantization_config
from qlora_kit.model.quantize import Quantization
from qlora_kit.model.quantized_head import put_coded_head, quantize_head
from qlora_kit.model.source import find_base

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a device beside the host")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=needs_cuda)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("host") / "llama", tie=False)


def hosted(model: Any) -> Any:
    put_on_host(model, embedding_for_host(model, "tiny", []))
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    return model


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 17), (2, 1, 33), (2, 0)], ids=str)
def test_rows_are_those_of_a_plain_embedding(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 7, generator=generator).to(dtype)
    ids = torch.randint(0, 11, shape, generator=generator).to(device)
    found = rows_in_use(weight, ids, device.type == "cuda")
    assert found.device.type == device.type and found.dtype == dtype
    assert torch.equal(found.cpu(), F.embedding(ids.cpu(), weight))


def test_an_id_that_is_no_token() -> None:
    with pytest.raises(IndexError):
        HostEmbedding(torch.ones(4, 2))(torch.tensor([4]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_rows_that_cannot_be_pinned() -> None:
    with pytest.raises(OutOfMemory, match=r"no 0\.0 MiB of pinned memory.*Free some.*set base\.embeddings=device"):
        rows_in_use(torch.ones(4, 2), torch.tensor([1]), pin=True)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_a_model_answers_and_learns_the_same(arch: str) -> None:
    ids, found = tiny_ids(0, 2, 13), []
    for away in (False, True):
        model: Any = tiny_model(arch, tie_word_embeddings=False)
        model = hosted(model) if away else model
        answers = generate_greedily(model, tiny_tokenizer(), [ids[0].tolist(), ids[1, :5].tolist()], 6)
        torch.manual_seed(1)
        method_for(LoraSettings(rank=2, dropout=0.1)).inject(model)
        model.train().activation_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [weight.grad for weight in trainable_parameters(model).values()]
        found.append((answers, [loss.detach(), *gradients]))
    (plain_answers, plain), (answers, values) = found
    assert answers == plain_answers and len(plain) == len(values) > 4
    assert all(torch.equal(one, other) for one, other in zip(plain, values, strict=True))


def test_the_weight_follows_to_another_dtype_and_to_no_device(untied: Path) -> None:
    plain: Any = load_base(find_base(str(untied)), compute_dtype=torch.float32)
    weight = plain.get_input_embeddings().weight.detach()
    model = hosted(plain)
    names, on_meta = set(model.state_dict()), model.bfloat16().to("meta")
    assert "model.embed_tokens.weight" in names and set(on_meta.state_dict()) == names
    kept = on_meta.get_input_embeddings().weight
    assert on_meta.device.type == "meta" and torch.equal(kept, weight.bfloat16())


def test_what_is_loaded_onto_another_device_leaves_the_embedding_mapped_to_its_file(untied: Path) -> None:
    """The device that has no memory stands for one that has another."""
    model: Any = load_base(find_base(str(untied)), compute_dtype=torch.float32, device="meta", host_embeddings=True)
    assert {weight.device.type for weight in model.parameters()} == {"meta"} and model.device.type == "meta"
    weight = model.get_input_embeddings().weight
    plain: Any = load_base(find_base(str(untied)), compute_dtype=torch.float32)
    assert torch.equal(weight, plain.get_input_embeddings().weight)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules()), "accelerate would copy it to the device"
    maps = Path("/proc/self/maps")
    if maps.exists():
        ranges = (re.match(r"(\w+)-(\w+) .*model\.safetensors", line) for line in maps.read_text().splitlines())
        assert any(int(r[1], 16) <= weight.data_ptr() < int(r[2], 16) for r in ranges if r)


def test_where_the_device_is_the_host_nothing_changes(untied: Path) -> None:
    model: Any = load_base(find_base(str(untied)), "nf4", host_embeddings=True)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert device_map(CPU, "embed") == {"": "cpu"}
    assert device_map(torch.device("cuda", 1), "embed") == {"embed": "cpu", "": "cuda:1"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_lets_a_part_stay_on_the_host(kind: str) -> None:
    places = device_map(torch.device("cuda", 0), "embed")
    for split in (True, False):
        quantizer = AutoHfQuantizer.from_config(quantization_config(Quantization(kind), torch.float32, None, split))
        if split:
            quantizer.validate_environment(device_map=places)
        else:
            with pytest.raises(ValueError, match="dispatched on the CPU"):
                quantizer.validate_environment(device_map=places)


def test_a_prompt_lies_where_the_model_does(untied: Path) -> None:
    model: Any = hosted(load_base(find_base(str(untied)), compute_dtype=torch.float32))
    method_for(PromptTuningSettings(tokens=3)).inject(model)
    ids = tiny_ids()
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_embeddings_that_the_device_needs() -> None:
    with pytest.raises(ModelError, match=r"embedding of x cannot stay on the host: its output head is tied.*=device"):
        embedding_for_host(tiny_model("llama", tie_word_embeddings=True), "x", [])
    scaled = tiny_model("gemma3_text", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="none of the plain kind, but a Gemma3TextScaledWordEmbedding"):
        embedding_for_host(scaled, "x", [])
    untied = tiny_model("llama", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"adapter\.modules_to_save trains it"):
        embedding_for_host(untied, "x", ["lm_head", "embed_tokens"])
    assert embedding_for_host(untied, "x", ["lm_head"]) == "model.embed_tokens"
    coded: Any = tiny_model("llama", tie_word_embeddings=True)
    put_coded_head(coded, quantize_head(coded.lm_head.weight, "int8", True, None), torch.float32)
    with pytest.raises(ModelError, match="but a CodedEmbedding"):
        embedding_for_host(coded, "x", [])


def test_a_tied_model_is_refused_on_every_device(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"base\.embeddings=host.*tied"):
        load_base(find_base(str(tiny_llama)), "nf4", host_embeddings=True)


@needs_cuda
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_on_a_gpu_logits_are_the_same(untied: Path, quant: str) -> None:
    source, ids = find_base(str(untied)), tiny_ids().cuda()
    plain, model = (load_base(source, quant, device="cuda", host_embeddings=away) for away in (False, True))
    assert not model.get_input_embeddings().weight.is_cuda and model.device.type == "cuda"
    assert torch.equal(model(ids).logits, plain(ids).logits)
