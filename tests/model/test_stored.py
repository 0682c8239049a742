"""Quantized models on disk: the same bytes as a fresh quantization, and nothing else is taken for them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.errors import ModelError
from qlora_kit.model import storing
from qlora_kit.model.cache import cached, forget, kept_models, made_as
from qlora_kit.model.load import Architecture, load_base
from qlora_kit.model.source import cache_dir, find_base
from qlora_kit.model.stored import MANIFEST
from qlora_kit.model.storing import write_stored

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert same_bytes(tensor, theirs[name]), name


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def store(model_folder: Path, target: Path, quant: str = "nf4", double_quant: bool = True) -> Path:
    source, how = find_base(str(model_folder)), {"kind": quant, "double_quant": double_quant}
    made = made_as(source, how, torch.float32, "cpu", None, "AutoModelForCausalLM")
    write_stored(load_base(source, quant, double_quant, torch.float32), source.folder, target, made)
    return target


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_comes_back(tmp_path: Path, arch: str) -> None:
    source = find_base(str(save_tiny_model(tmp_path / "model", arch)))
    fresh = load_base(source, "nf4", compute_dtype=torch.float32)
    kept, again = (load_base(source, "nf4", compute_dtype=torch.float32, cache=True) for _ in range(2))
    assert len(kept_models()) == 1
    assert_same(fresh, kept)
    assert_same(fresh, again)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in again.parameters()) and not again.training
    with torch.no_grad():
        assert torch.equal(fresh(tiny_ids()).logits, again(tiny_ids()).logits)


@pytest.mark.parametrize("quant,double_quant", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kind_comes_back_through_several_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, double_quant: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(storing, "SHARD_BYTES", 40_000)
    source = find_base(str(save_tiny_model(tmp_path / "model", tie=False)))
    fresh = load_base(source, quant, double_quant, dtype)
    first, second = (load_base(source, quant, double_quant, dtype, cache=True) for _ in range(2))
    assert len(list(kept_models()[0].folder.glob("*.safetensors"))) > 2
    assert_same(fresh, first)
    assert_same(fresh, second)


def test_a_second_load_reads_the_cache_alone(tiny_llama: Path) -> None:
    """Weights that were changed there after it was written, hashes and all, are the ones that come."""
    source = find_base(str(tiny_llama))
    load_base(source, "nf4", cache=True)
    folder = kept_models()[0].folder
    shard = folder / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64
    shard.write_bytes(content)
    tree = json.loads((folder / MANIFEST).read_text())
    tree["sha256"][shard.name] = storing.sha256_file(shard)
    (folder / MANIFEST).write_text(json.dumps(tree))
    changed, fresh = load_base(source, "nf4", cache=True).state_dict(), load_base(source, "nf4").state_dict()
    assert sum(not same_bytes(changed[name], fresh[name]) for name in fresh) == 1


def test_a_fresh_head_is_none_of_the_cache(tiny_llama: Path) -> None:
    architecture = Architecture("AutoModelForSequenceClassification", {"num_labels": 3}, fresh_head=True)
    models = []
    for cache in (False, True, True):
        torch.manual_seed(5)
        models.append(load_base(find_base(str(tiny_llama)), "nf4", architecture=architecture, cache=cache))
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])
    torch.manual_seed(6)
    other = load_base(find_base(str(tiny_llama)), "nf4", architecture=architecture, cache=True)
    assert not torch.equal(other.score.weight, models[0].score.weight)
    assert len(kept_models()) == 1


def test_what_decides_over_the_bytes_is_kept_apart(tmp_path: Path) -> None:
    one, other = (find_base(str(save_tiny_model(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    load_base(one, "nf4", cache=True)
    load_base(other, "nf4", cache=True)
    load_base(one, "nf4", double_quant=False, cache=True)
    load_base(one, "nf4", compute_dtype=torch.float32, cache=True)
    load_base(one, "nf4", skip_modules=["down_proj"], cache=True)
    load_base(one, "int8", cache=True)
    assert len(kept_models()) == 6
    load_base(one, "none", cache=True)
    load_base(one, "nf4", cache=True, quantize_later=True)
    assert len(kept_models()) == 6


def flip(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def cut(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)


def lose(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def scribble(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "layers": ')


def age(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format": 1', '"format": 0'))


def foreign(folder: Path) -> None:
    tree = json.loads((folder / MANIFEST).read_text())
    tree["made_as"]["base"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(tree))


REASONS = {
    flip: "is not as it was written",
    cut: "is not as it was written",
    lose: "No such file",
    scribble: "is damaged",
    age: "is of another version",
    foreign: "was made from another model or in another way",
}


@pytest.mark.parametrize("damage", REASONS, ids=lambda one: one.__name__)
def test_a_damaged_cache_is_made_again(tiny_llama: Path, caplog: pytest.LogCaptureFixture, damage: object) -> None:
    source = find_base(str(tiny_llama))
    fresh = load_base(source, "nf4", cache=True)
    assert not caplog.messages
    damage(kept_models()[0].folder)  # type: ignore[operator]
    assert_same(fresh, load_base(source, "nf4", cache=True))
    assert len(caplog.messages) == 1 and REASONS[damage] in caplog.text and "made again" in caplog.text  # type: ignore[index]
    assert_same(fresh, load_base(source, "nf4", cache=True))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("damage", [flip, cut, lose], ids=lambda one: one.__name__)
def test_a_damaged_stored_model_is_refused(tiny_llama: Path, tmp_path: Path, damage: object) -> None:
    folder = store(tiny_llama, tmp_path / "stored")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"not as it was written.*qlora-kit quantize|is missing in|holds no weights"):
        load_base(find_base(str(folder)), "nf4")


@pytest.mark.parametrize("quant,double_quant", KINDS)
def test_a_stored_model_is_a_base(tiny_llama: Path, tmp_path: Path, quant: str, double_quant: bool) -> None:
    stored = load_base(find_base(str(store(tiny_llama, tmp_path / "stored", quant, double_quant))), quant, double_quant)
    bf16 = load_base(find_base(str(tiny_llama)), quant, double_quant, torch.float32).bfloat16()
    assert_same(stored, bf16)


def test_a_stored_model_is_taken_for_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    source = find_base(str(store(tiny_llama, tmp_path / "stored")))
    with pytest.raises(ModelError, match=r"is stored as nf4.*got 'int8'.*Set base.quant=nf4"):
        load_base(source, "int8")
    with pytest.raises(ModelError, match=r"is stored as nf4.*got 'none'"):
        load_base(source, "none")
    with pytest.raises(ModelError, match=r"stored otherwise.*Set base.double_quant=true"):
        load_base(source, "nf4", double_quant=False)
    with pytest.raises(ModelError, match="adapter's method needs it whole"):
        load_base(source, "nf4", quantize_later=True)
    with pytest.raises(ModelError, match=r"mlp.down_proj is quantized, and is to be trained"):
        load_base(source, "nf4", skip_modules=["down_proj"])
    load_base(source, "nf4", skip_modules=["lm_head"])


def test_no_room_on_the_disk(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storing, "_SPARE_BYTES", 2**60)
    model = load_base(find_base(str(tiny_llama)), "nf4", cache=True)
    assert "not cached" in caplog.text and "has no room" in caplog.text and "GiB free" in caplog.text
    assert_same(model, load_base(find_base(str(tiny_llama)), "nf4"))
    assert not kept_models()


def test_others_do_not_take_it_for_a_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((store(tiny_llama, tmp_path / "stored") / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qlora_kit"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")  # here the format is known
    assert_same(load_base(find_base(str(tmp_path / "stored")), "nf4", compute_dtype=torch.float32), loaded)


def test_listing_and_clearing(tiny_llama: Path) -> None:
    source = find_base(str(tiny_llama))
    load_base(source, "nf4", cache=True)
    load_base(source, "int8", cache=True)
    (cache_dir() / "quantized" / ".partial-of-a-killed-one").mkdir()
    kept = kept_models()
    assert sorted(one.kind for one in kept) == ["quantized", "quantized", "unfinished"]
    name = next(one.folder.name for one in kept if "int8" in one.about)
    with pytest.raises(ModelError, match=r"no such folder.*got 'other'.*Allowed: "):
        forget(["other"])
    assert [one.folder.name for one in forget([name])] == [name]
    assert len(forget([])) == 2 and kept_models() == []
    assert cached({"name": "never"}) is None
