"""Where `plan` finds a model's config: folders, GGUF files, the hub; and what it says where there is none."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from planned_models import LLAMA, tiny_model
from transformers import AutoConfig

from qlora_kit.errors import ModelError
from qlora_kit.plan import find_config, model_shapes
from qlora_kit.recipe import BaseSection


def write_gguf(path: Path, tied: bool) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(32)
    for name, shape in {"token_embd.weight": (40, 8), "blk.0.attn_q.bias": (8,), "output.weight": (40, 8)}.items():
        if not (tied and name == "output.weight"):
            writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("tied", "name"), [(True, "tiny.gguf"), (False, "tiny.GGUF")])
def test_config_of_a_gguf_file(tied: bool, name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / name, tied)
    config = find_config(BaseSection(model=str(tmp_path / name)))
    options = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    model, _ = tiny_model("qwen2", options)
    assert model_shapes(config).parameters() == {name: item.numel() for name, item in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("none.gguf", None, "no such GGUF file"),
        ("bad.gguf", b"not a model at all, whatever", "not a readable GGUF model"),
        ("bad.gguf", b"", "not a readable GGUF model"),
        ("model.bin", b"x", "a hub id, a folder or a .gguf file"),
        ("nowhere", None, "a hub id, a folder or a .gguf file"),
        ("folder/config.json", b"{", "is not JSON"),
        ("folder/config.json", b"[]", "holds no config"),
        ("folder/other.json", b"{}", r"has no config\.json"),
    ],
)
def test_a_config_that_cannot_be_found(name: str, content: bytes | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    model = path.parent if "/" in name else path
    with pytest.raises(ModelError, match=match):
        find_config(BaseSection(model=str(model)))


def test_a_hub_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline, and nothing cached\nmore")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"base\.model a/b: .*\(offline, and nothing cached\)"):
        find_config(BaseSection(model="a/b"))


def test_a_hub_config_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: AutoConfig.for_model("llama", **LLAMA))
    assert model_shapes(find_config(BaseSection(model="a/b"))).hidden == 96
