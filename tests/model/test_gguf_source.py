"""GGUF files: the weights and tokenizer that went in, converted once, damaged ones refused with nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import BOS, CHATML, CONTEXT_LENGTH, EOS, VOCAB_SIZE, tiny_ids, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from write_gguf import gguf_name, interleaved

import qlora_kit.model.gguf as converter
from qlora_kit.errors import ModelError
from qlora_kit.model.load import load_base, load_tokenizer
from qlora_kit.model.source import find_base

Q = gguf.GGMLQuantizationType


def to_gguf_layout(name: str, weight: np.ndarray, config) -> np.ndarray:
    """llama.cpp interleaves the rotary halves of q and k."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return weight if heads is None else interleaved(weight, heads)


def add_tokenizer(writer: gguf.GGUFWriter, eos: bool = True) -> None:
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([special if i < 3 else normal for i in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(EOS)
    writer.add_chat_template(CHATML)


def write_gguf(path: Path, model: PreTrainedModel, kind: Q = Q.F32, leave_out: str = "") -> dict[str, torch.Tensor]:
    """Writes `model`; returns its weights as GGUF holds them, by transformers' names."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    add_tokenizer(writer)
    stored = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        stored[name] = parameter.detach().clone()
        if weight.ndim == 2 and kind != Q.F32:
            stored[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind).reshape(weight.shape))
            packed = gguf.quantize(np.ascontiguousarray(to_gguf_layout(name, weight, config)), kind)
        else:
            packed = np.ascontiguousarray(to_gguf_layout(name, weight, config))
        if name != leave_out:
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind if weight.ndim == 2 else Q.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def tiny(tie: bool = True) -> PreTrainedModel:
    return tiny_model("llama", intermediate_size=128, tie_word_embeddings=tie)  # GGUF's blocks hold 32 values


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tie", [True, False])
def test_the_weights_are_the_ones_that_went_in(tmp_path, cache, kind, tie):
    stored = write_gguf(tmp_path / "tiny.gguf", tiny(tie), kind)
    model = load_base(find_base(str(tmp_path / "tiny.gguf")), "none", compute_dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    found = dict(model.named_parameters())
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], weight) for name, weight in stored.items())
    if kind == Q.F32:
        with torch.no_grad():
            assert torch.equal(model(tiny_ids()).logits, tiny(tie)(tiny_ids()).logits)


def test_the_tokenizer_comes_along(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny())
    found, wanted = load_tokenizer(find_base(str(tmp_path / "tiny.gguf")).folder), tiny_tokenizer()
    text = "<|im_start|>user\nThe bridge — 3 boats?<|im_end|>\n"
    assert found(text).input_ids == wanted(text).input_ids
    assert found.decode(found(text).input_ids) == text
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == (EOS, BOS, EOS)
    assert found.chat_template == CHATML


def test_it_is_converted_once(tmp_path, cache):
    path = tmp_path / "tiny.GGUF"
    write_gguf(path, tiny())
    first = find_base(str(path))
    assert [first.folder] == list(cache.iterdir())
    stamps = {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    moved = path.rename(tmp_path / "moved.gguf")
    second = find_base(str(moved))
    assert second.folder == first.folder
    assert second.fingerprint() == first.fingerprint()
    assert {file.name: file.stat().st_mtime_ns for file in second.folder.iterdir()} == stamps
    assert not any(str(tmp_path) in file.read_text() for file in first.folder.glob("*.json"))
    write_gguf(tmp_path / "other.gguf", tiny_model("llama", seed=1, intermediate_size=128))
    assert find_base(str(tmp_path / "other.gguf")).folder != first.folder


def test_where_another_process_was_first_its_folder_stays(tmp_path, cache):
    target, partial = tmp_path / "target", tmp_path / "partial"
    for folder, text in ((target, "{}"), (partial, "{ }")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    converter._move(partial, target)
    assert (target / "config.json").read_text() == "{}"
    (target / "config.json").rename(target / "junk")
    with pytest.raises(OSError, match="not empty"):
        converter._move(partial, target)


def test_it_quantizes_and_generates(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny(), Q.Q8_0)
    model = load_base(find_base(str(tmp_path / "tiny.gguf")), "nf4", compute_dtype=torch.float32)
    assert model.generate(tiny_ids(rows=1), max_new_tokens=3, do_sample=False, min_new_tokens=3).shape == (1, 15)


def assert_refused(path: Path, cache: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        find_base(str(path))
    assert not cache.exists() or not list(cache.iterdir())  # nothing half-written stays


def test_a_missing_tensor_is_named(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", tiny(), leave_out="model.layers.1.mlp.up_proj.weight")
    assert_refused(tmp_path / "tiny.gguf", cache, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing")


def test_damaged_files_are_refused(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny())
    whole = path.read_bytes()
    for end in (5, 12, 20, 40, 200, 3000, 9000, len(whole) // 2, len(whole) - 50_000, len(whole) - 300):
        path.write_bytes(whole[:end])
        assert_refused(path, cache, "this GGUF cannot be read")
    generator = np.random.default_rng(0)
    for _ in range(3):  # counts and lengths of the header
        data = bytearray(whole)
        data[8:24] = generator.bytes(16)
        path.write_bytes(data)
        assert_refused(path, cache, "this GGUF cannot be read")


def test_what_is_no_gguf(tmp_path, cache):
    assert_refused(tmp_path / "none.gguf", cache, "no such GGUF file")
    (tmp_path / "text.gguf").write_text("<html>not found</html>")
    assert_refused(tmp_path / "text.gguf", cache, "is not a GGUF file")
    (tmp_path / "folder.gguf").mkdir()
    assert_refused(tmp_path / "folder.gguf", cache, "no such GGUF file")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(tmp_path / "odd.gguf", cache, "this GGUF cannot be read")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written: Not a directory\. Set QLORA_KIT_CACHE"):
        find_base(str(tmp_path / "tiny.gguf"))
