"""Model folders and tokenizers that cannot be used: each refused by name, no code of theirs run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CHATML, save_tiny_model, tiny_ids, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qlora_kit.errors import ModelError
from qlora_kit.model.load import load_base, load_tokenizer
from qlora_kit.model.source import find_base


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_a_sharded_folder_loads(sharded):
    source = find_base(str(sharded))
    assert len([name for name in source.sha256 if name.endswith(".safetensors")]) > 2
    model = load_base(source, "nf4", compute_dtype=torch.float32)
    whole = load_base(find_base(str(sharded.parent / "whole")), "nf4", compute_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, whole(tiny_ids()).logits)


def test_a_missing_shard_or_a_broken_index_is_named(sharded):
    shard = max(sharded.glob("*.safetensors"))
    shard.rename(sharded / "gone")
    with pytest.raises(ModelError, match=f"shard {shard.name} is missing"):
        find_base(str(sharded))
    index = sharded / "model.safetensors.index.json"
    for text, match in (("{", "is not JSON"), ("[]", "is not a JSON object"), ("{}", "has no weight_map")):
        index.write_text(text)
        with pytest.raises(ModelError, match=match):
            find_base(str(sharded))


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A good model folder, to be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_not_filled_with_random_numbers(folder, lost, quant):
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor {lost} is missing"):
        load_base(find_base(str(folder)), quant)


@pytest.mark.parametrize("keep", [-9, 1000, 4, 0])
def test_cut_weights_are_refused(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(find_base(str(folder)), "nf4")


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_size": 128}, "cannot be loaded|has another shape"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing in the weights .and 8 more"),
        ({"vocab_size": -1}, "cannot be loaded"),
        ({"rope_parameters": {"rope_type": "no such"}}, "cannot be loaded"),
        ({"model_type": "no_such_model"}, "cannot be loaded"),
        ({"model_type": None, "architectures": None}, "cannot be loaded"),
        ({"model_type": "t5"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(folder, fields, match):
    change_config(folder, **fields)
    with pytest.raises(ModelError, match=match):
        load_base(find_base(str(folder)), "none")


@pytest.mark.parametrize("text,match", [("{", "is not JSON"), ("[]", "is not a JSON object"), ("", "is not JSON")])
def test_a_broken_config_is_named(folder, text, match):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"config.json {match}"):
        find_base(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, which is a pickle.*Allowed: .safetensors"):
        find_base(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        find_base(str(folder))


def test_a_pickle_beside_other_safetensors_is_never_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*no file named model\.safetensors"):
        load_base(find_base(str(folder)), "none")
    assert not (tmp_path / "ran").exists()


def test_nothing_to_quantize_is_said(folder):
    with pytest.raises(ModelError, match=r"has no linear layer to quantize. Set base\.quant=none"):
        load_base(find_base(str(folder)), "nf4", skip_modules=["layers"])


def test_remote_code_is_refused_and_never_run(folder, tmp_path):
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ModelError, match=r"needs Python code from its repository.*base.trust_remote_code=true"):
        find_base(str(folder))
    source = find_base(str(folder), trust_remote_code=True)
    for skip in (None, ["mlp"]):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_base(source, "nf4", skip_modules=skip)
    assert not (tmp_path / "ran").exists()


def test_a_known_model_with_code_of_its_own_runs_without_it(folder, tmp_path):
    change_config(folder, auto_map={"AutoModelForCausalLM": "code.M"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    assert load_base(find_base(str(folder)), "nf4").config.model_type == "llama"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "a/b/c", "no.gguf", "~/no/such/model", r"C:\models\no"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ModelError, match=r"base.model(: no such GGUF file| names no model) .got "):
        find_base(name)


def test_a_file_is_no_model(folder):
    with pytest.raises(ModelError, match="names no model"):
        find_base(str(folder / "config.json"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_base(str(folder.parent))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not..an..id", "gpt9"])
def test_a_hub_id_without_a_network_is_a_model_error(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=f"{name}: no such folder here, and the hub did not give it .*network"):
        find_base(name)


def test_a_revision_of_a_folder_means_nothing(tiny_llama):
    with pytest.raises(ModelError, match=r"base\.revision means a hub id's version"):
        find_base(str(tiny_llama), revision="main")


def test_the_fingerprint_is_of_all_files_that_define_the_model(folder):
    first = find_base(str(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= first.sha256.keys()
    (folder / "notes.md").write_text("not part of it")
    assert find_base(str(folder)).fingerprint() == first.fingerprint()
    (folder / "chat_template.jinja").write_text(CHATML + " ")
    assert find_base(str(folder)).fingerprint() != first.fingerprint()


def test_the_tokenizer_pads_right_with_eos_where_it_has_no_pad(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (tokenizer.eos_token_id, "right")
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.padding_side = "left"
    bare.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "right")


def test_tokenizers_that_cannot_be_used(folder):
    silent = tiny_tokenizer()
    silent.eos_token = silent.pad_token = None
    silent.save_pretrained(folder)
    with pytest.raises(ModelError, match="the tokenizer has no eos_token"):
        load_tokenizer(folder)
    for text in ("{", '{"model": {"type": "Nonsense"}}', ""):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match="no tokenizer"):
            load_tokenizer(folder)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder / "nowhere")


def test_a_slow_tokenizer_is_refused(folder):
    from transformers import ByT5Tokenizer

    (folder / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="only a slow tokenizer"):
        load_tokenizer(folder)
