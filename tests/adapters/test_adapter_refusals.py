"""Adapters and settings that cannot be used: each refused by name, the model left as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from qlora_kit.adapters.inject import adapted_layers, find_targets
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import fill_adapter, load_adapter, read_adapter, save_adapter
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError

SETTINGS = LoraSettings(rank=2, alpha=4.0, target_modules=["q_proj"], dtype="fp32")
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, to be spoilt."""
    model = tiny_model("llama")
    Lora(SETTINGS).inject(model)
    save_adapter(model, Lora(SETTINGS), tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(folder: Path, match: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(AdapterError, match=match):
        load_adapter(model, folder)


UNSUPPORTED = {
    "lora_bias": True,
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": -1.0},
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2]],
    "target_parameters": ["mlp.experts"],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
    "bias": "some",
    "peft_type": "IA3",
    "r": 0,
    "lora_alpha": None,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_is_not_supported_is_named(folder, field):
    change_config(folder, **{field: UNSUPPORTED[field]})
    named = {"lora_alpha": "a field has a wrong type"}.get(field, rf"adapter_config.json: {field}\b")
    assert_refused(folder, named)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_a_missing_field_is_named(folder, field):
    path = folder / "adapter_config.json"
    tree = json.loads(path.read_text())
    del tree[field]
    path.write_text(json.dumps(tree))
    assert_refused(folder, f"field '{field}' is missing")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, f"is no adapter: {name} is missing")


def test_damaged_files(folder):
    config = folder / "adapter_config.json"
    good = config.read_text()
    for text, match in ((good[:-20], "is not JSON"), ("[1]", "is not a JSON object"), ("\0", "is not JSON")):
        config.write_text(text)
        assert_refused(folder, match)
    config.write_text(good)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-7], whole[:100], whole[:5], b""):
        weights.write_bytes(data)
        assert_refused(folder, "adapter_model.safetensors is damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_nothing_is_copied(folder, value):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.add_(1)
        tensors[max(tensors)][0, 0] = value

    change_tensors(folder, spoil)
    model = tiny_model("llama")
    Lora(SETTINGS).inject(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=r"q_proj.lora_B.weight holds NaN or Inf"):
        fill_adapter(model, Lora(SETTINGS), read_adapter(folder).tensors, "stored")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_tensors_that_do_not_fit(folder):
    change_tensors(folder, lambda tensors: tensors.update({A: torch.zeros(5, 64)}))
    assert_refused(folder, re.escape(f"shape of {A} (got [5, 64]). Allowed: [2, 64]"))
    change_tensors(folder, lambda tensors: tensors.pop(A.replace("lora_A", "lora_B")))
    assert_refused(folder, r"layers.0.self_attn.q_proj.lora_B.weight is missing")
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    change_tensors(folder, lambda tensors: tensors.update({embedding: torch.zeros(2, 320)}))
    assert_refused(folder, "tensor .* is ")


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    with pytest.raises(AdapterError, match=r"made for another model; this one has no layer model.layers.0.self_attn"):
        load_adapter(tiny_model("gpt2"), folder)
    with pytest.raises(AdapterError, match="shape of"):
        load_adapter(tiny_model("llama", hidden_size=32), folder)
    save_file({}, folder / "adapter_model.safetensors")
    assert_refused(folder, "it holds no Lora tensor")


def test_new_tokens_without_their_head_are_refused(folder):
    name = "base_model.model.model.embed_tokens.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(330, 64)}))
    assert_refused(folder, "not both the embedding and the head")


def test_a_layer_that_the_method_does_not_adapt_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"dora does not adapt model\.embed_tokens .*Embedding"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_a_second_adapter_is_refused():
    model = tiny_model("llama")
    Lora(SETTINGS).inject(model)
    with pytest.raises(AdapterError, match="already holds an adapter"):
        Lora(SETTINGS).inject(model)


@pytest.mark.parametrize(
    "wanted,match",
    [
        (["q_prj"], "matches no linear layer .got 'q_prj'.*down_proj.*did you mean q_proj"),
        (["q_proj", "xyzzy"], "matches no linear layer .got 'xyzzy'"),
        (["norm"], "matches no linear layer .got 'norm'"),
        (["proj"], "matches no linear layer"),
        ("q_proj(", "is not a regular expression"),
        ("q_proj", "matches no layer"),
    ],
)
def test_targets_that_match_nothing_are_explained(wanted, match):
    with pytest.raises(AdapterError, match=f"adapter.target_modules {match}"):
        find_targets(tiny_model("llama"), wanted)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_settings_of_a_layer_that_is_no_target(field):
    model = tiny_model("llama")
    for key, match in (("q_prj", r"did you mean q_proj\?"), ("k_proj", "Allowed: q_proj")):
        settings = SETTINGS.model_copy(update={field: {"layers.0.self_attn.q_proj": 3, key: 2}})
        with pytest.raises(AdapterError, match=rf"adapter.{field} matches no layer .*\(got '{key}'\).*{match}"):
            Lora(settings).inject(model)
        assert not any(adapted_layers(model))
    Lora(SETTINGS.model_copy(update={field: {r"layers\.[01]\.self_attn\.q_proj": 2}})).inject(model)


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save matches no module .got 'lm_hed'.*lm_head"),
        ({"modules_to_save": ["act_fn"]}, "layers.0.mlp.act_fn has no weight to train"),
        ({"modules_to_save": ["q_proj"]}, "both a target and a module to save .got 'model.layers.0.self_attn.q_proj'"),
        ({"modules_to_save": ["self_attn"]}, "both a target and a module to save"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, "both a target and a module to save"),
    ],
)
def test_modules_to_save_that_cannot_be(changes, match):
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=match):
        Lora(SETTINGS.model_copy(update=changes)).inject(model)
    assert not any(adapted_layers(model))
