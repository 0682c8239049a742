"""Adapters side by side: switching gives the logits of each, to the bit, as often as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_folders import adapter, logits
from tiny_models import save_tiny_model, tiny_model

from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.adapters.switch import AdapterSet
from qlora_kit.errors import AdapterError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "a": adapter(tmp_path / "a", 1, rank=3),
        "b": adapter(tmp_path / "b", 2, rank=5, alpha=4.0, target_modules=["q_proj", "lm_head"]),
        "c": adapter(tmp_path / "c", 3, method="dora", rank=2, target_modules=["v_proj"], dtype="bf16"),
    }


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_switching_is_bit_equal(tmp_path: Path, folders: dict[str, Path], quant: str) -> None:
    source = find_base(str(save_tiny_model(tmp_path / "base")))

    def base() -> torch.nn.Module:
        return load_base(source, quant, compute_dtype=torch.float32)

    alone = {None: logits(base())}
    for name, folder in folders.items():
        model = base()
        load_adapter(model, folder)
        alone[name] = logits(model)
    adapters = AdapterSet(base())
    weights = [p.data_ptr() for name, p in adapters.model.named_parameters() if "lm_head" not in name]
    for name, folder in folders.items():
        adapters.load(name, folder)
    assert adapters.names == ["a", "b", "c"] and adapters.current is None
    for name in (None, "a", "b", "a", "c", None, "b", "b", "a"):
        adapters.use(name)
        assert adapters.current == name and torch.equal(logits(adapters.model), alone[name]), name
    adapters.use(None)
    assert not list(adapted_layers(adapters.model))
    assert weights == [p.data_ptr() for name, p in adapters.model.named_parameters() if "lm_head" not in name]


def test_one_more_is_loaded_beside_the_one_in_use(folders: dict[str, Path]) -> None:
    adapters = AdapterSet(tiny_model("llama"))
    adapters.load("a", folders["a"])
    adapters.use("a")
    before = logits(adapters.model)
    adapters.load("b", folders["b"])
    assert adapters.current == "a" and torch.equal(logits(adapters.model), before)


def test_what_cannot_be_switched_leaves_all_as_it_was(tmp_path: Path, folders: dict[str, Path]) -> None:
    adapters = AdapterSet(tiny_model("llama"))
    adapters.load("a", folders["a"])
    adapters.use("a")
    before = logits(adapters.model)
    full = adapter(tmp_path / "full", 1, modules_to_save=["norm"])
    wide = adapter(tmp_path / "wide", 1, "qwen2", bias="all")
    for name, folder, match in (
        ("a", folders["a"], "an adapter of this name is loaded .got 'a'"),
        ("n", full, "model.norm.weight replaces a weight of the base"),
        ("n", wide, "bias replaces a weight"),
        ("n", adapter(tmp_path / "gpt2", 1, "gpt2"), "made for another model"),
        ("n", adapter(tmp_path / "pissa", 1, method="pissa"), "is a Pissa adapter.* Allowed: low-rank ones"),
        ("n", tmp_path / "nowhere", "no folder .*nowhere"),
        ("n", tmp_path, "holds no adapter: neither adapter_config.json nor adapter/adapter_config.json"),
    ):
        with pytest.raises(AdapterError, match=match):
            adapters.load(name, folder)
        assert adapters.names == ["a"] and torch.equal(logits(adapters.model), before)
    with pytest.raises(AdapterError, match=r"no adapter of this name .got 'z'.. Allowed: a"):
        adapters.use("z")
    with pytest.raises(AdapterError, match="already holds an adapter"):
        AdapterSet(adapters.model)
