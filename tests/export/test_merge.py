"""The merge: base plus delta to the last bit, and the merged folder as plain transformers reads it."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model, tiny_ids, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.lora import Lora, LoraLinear
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import ExportError
from qlora_kit.export.merge import merge_adapter, save_merged
from qlora_kit.export.weight_files import WeightFiles
from qlora_kit.model.load import load_base, to_reference
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base

SETTINGS = LoraSettings(rank=3, alpha=7.0, dtype="fp32")
ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[str, bool, str, dict[str, Any]]] = {  # architecture, tied head, quant, settings
    "nf4": ("llama", True, "nf4", {}),
    "fp4, some layers without adapter": ("llama", False, "fp4", {"target_modules": ATTENTION}),
    "int8": ("llama", True, "int8", {}),
    "unquantized, bf16 adapter": ("llama", True, "none", {"dtype": "bf16"}),
    "biases": ("qwen2", False, "nf4", {"bias": "all"}),
    "biases of targets": ("qwen2", False, "int8", {"bias": "lora_only", "target_modules": ATTENTION}),
    "rsLoRA": ("mistral", False, "nf4", {"use_rslora": True}),
    "Conv1D": ("gpt2", True, "none", {"bias": "all"}),
    "Conv1D quantized": ("gpt2", True, "nf4", {}),
    "head in full": ("llama", False, "nf4", {"modules_to_save": ["lm_head", "norm"]}),
    "tied head in full": ("llama", True, "nf4", {"modules_to_save": ["embed_tokens"]}),
    "tied head as target": ("llama", True, "nf4", {"target_modules": ["lm_head", "q_proj"]}),
    "fused projections": ("phi3", False, "nf4", {}),
}


def tuned_model(folder: Path, arch: str, tie: bool, quant: str, changes: dict[str, Any]) -> Any:
    """A reference with an adapter that changes every layer."""
    settings = SETTINGS.model_copy(update=changes)
    source = find_base(str(save_tiny_model(folder / "base", arch, tie)))
    model = load_base(source, quant, compute_dtype=torch.float32, skip_modules=settings.modules_to_save)
    Lora(settings).inject(model)
    torch.manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.1 * torch.randn_like(parameter.float()))
    return to_reference(model)


def expected_weight(layer: LoraLinear) -> torch.Tensor:
    """W + s B A written out: [out, in] float32."""
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        weight = base.dequantize(torch.float32)
    else:
        weight = base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()
    delta = torch.matmul(layer.lora_B.detach().float(), layer.lora_A.detach().float()).mul(layer.scaling)
    return weight + delta


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_plus_delta_and_loads_in_transformers(tmp_path: Path, kind: str) -> None:
    model = tuned_model(tmp_path, *KINDS[kind])
    ids = tiny_ids(rows=3, length=20)
    with torch.no_grad():
        reference = model(input_ids=ids).logits
    expected = {name: expected_weight(layer) for name, layer in adapted_layers(model)}
    deltas = save_merged(model, tiny_tokenizer(), tmp_path / "merged", partial(merge_adapter, model))
    assert [delta.name for delta in deltas] == list(expected) and all(delta.ratio > 0 for delta in deltas)
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        merged = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        assert merged.dtype == torch.float32 and torch.equal(merged, weight), name
    assert not any(isinstance(module, LoraLinear | QuantizedLinear) for module in model.modules())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "tied head in full", "Conv1D quantized"])
def test_a_merged_model_lies_on_disk_and_its_files_are_transformers_own(tmp_path: Path, kind: str) -> None:
    """In one file, or in several; the weights of the merged model are these files, mapped."""
    model = tuned_model(tmp_path, *KINDS[kind])
    again = deepcopy(model)
    merge_adapter(again)
    again.save_pretrained(tmp_path / "theirs")
    save_merged(model, tiny_tokenizer(), tmp_path / "ours", partial(merge_adapter, model))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "theirs" / file).read_text()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    places = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert all(any(a <= weight.data_ptr() < b for a, b in places) for weight in model.state_dict().values())

    (tmp_path / "shards").mkdir()
    with WeightFiles(tmp_path / "shards", shard_bytes=20_000) as files:
        for name, weight in ours.items():
            files.hold(name, weight)
    again.config.save_pretrained(tmp_path / "shards")
    names = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    count = len(names)
    assert count > 2 and f"model-00002-of-{count:05d}.safetensors" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in again.state_dict().items())


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    model = tuned_model(tmp_path, "llama", True, "nf4", {})
    tokenizer = tiny_tokenizer()
    save_merged(model, tokenizer, tmp_path / "merged", partial(merge_adapter, model))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    chat = [{"role": "user", "content": "Where does the road end? 🙂"}]
    assert loaded.apply_chat_template(chat, return_dict=False) == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize("scale, word", [(3e38, "overflow"), (float("nan"), "nan")])
def test_a_delta_that_is_not_finite_names_its_layer(tmp_path: Path, scale: float, word: str) -> None:
    model = tuned_model(tmp_path, "llama", True, "nf4", {})
    name, layer = list(adapted_layers(model))[5]
    layer.lora_B.data.mul_(scale)
    layer.lora_A.data.mul_(1e6 if word == "overflow" else 1)
    with pytest.raises(ExportError, match=rf"{name}: the merged weight holds NaN or Inf.*earlier checkpoint"):
        merge_adapter(model)


def test_norms_in_the_report_are_those_of_delta_and_base(tmp_path: Path) -> None:
    model = tuned_model(tmp_path, "llama", True, "none", {"target_modules": ["o_proj"]})
    layers = dict(adapted_layers(model))
    expected = {n: (layer.delta().norm().item(), layer.base_layer.weight.norm().item()) for n, layer in layers.items()}
    for delta in merge_adapter(model):
        assert (delta.delta_norm, delta.weight_norm) == pytest.approx(expected[delta.name], rel=1e-4)


def test_a_folder_that_cannot_be_written_is_said_and_the_old_one_stays(tmp_path: Path) -> None:
    model = tuned_model(tmp_path, "llama", True, "none", {})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"merged cannot be written: .*Free some space"):
        save_merged(model, tiny_tokenizer(), tmp_path / "file" / "merged", partial(merge_adapter, model))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "file"}
