"""What `plan` counts as trained: whole modules, biases, embeddings, and each method's own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planned_models import CONFIGS, GPT2, LLAMA, parts, recipe_of, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.methods import METHODS
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.plan import plan
from qlora_kit.plan.memory import optimizer_bytes


def test_what_is_trained_in_full_counts() -> None:
    config = LLAMA | {"model_type": "llama", "tie_word_embeddings": True}
    lora = plan(recipe_of(), config)
    vocabulary = 160 * 96
    tied = plan(recipe_of(adapter={"modules_to_save": ["lm_head"]}), config)
    assert tied.trainable_parameters - lora.trainable_parameters == vocabulary
    grown = plan(recipe_of(adapter={"new_tokens": ["<a>", "<b>"]}), config)
    assert grown.trainable_parameters - lora.trainable_parameters == vocabulary + 2 * 96
    assert parts(grown)["embeddings"] == 2 * (vocabulary + 2 * 96)
    untied = plan(recipe_of(adapter={"new_tokens": ["<a>"]}), config | {"tie_word_embeddings": False})
    assert untied.trainable_parameters - lora.trainable_parameters == 2 * (vocabulary + 96)
    norm = plan(recipe_of(adapter={"modules_to_save": ["norm"]}), config)
    assert norm.trainable_parameters - lora.trainable_parameters == 96


def test_a_linear_layer_trained_in_full_is_not_quantized() -> None:
    adapter = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    found = plan(recipe_of(adapter=adapter), LLAMA | {"model_type": "llama"})
    assert parts(found)["linear layers trained in full"] == 2 * 2 * 200 * 96


def test_all_linear_leaves_out_what_is_trained_in_full() -> None:
    model, config = tiny_model("llama", LLAMA)
    adapter = {"target_modules": "all-linear", "modules_to_save": ["q_proj", "layers.0.mlp"]}
    settings = LoraSettings(rank=16, modules_to_save=adapter["modules_to_save"])  # type: ignore[arg-type]
    assert isinstance(model, PreTrainedModel)
    found = plan(recipe_of(adapter=adapter), config)
    assert found.targets == Lora(settings).inject(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.trainable_parameters == trained


def test_fp16_trains_whole_modules_in_fp32() -> None:
    base, adapter = {"model": "tiny", "compute_dtype": "fp16"}, {"modules_to_save": ["embed_tokens"]}
    found = plan(recipe_of(base=base, adapter=adapter), LLAMA | {"model_type": "llama"})
    assert parts(found)["embeddings"] == 4 * 160 * 96
    assert parts(found)["output head"] == 2 * 160 * 96


@pytest.mark.parametrize(
    ("kind", "options", "targets"),
    [("llama", LLAMA, ["embed_tokens", "q_proj"]), ("gpt2", GPT2, r".*\.(wte|wpe|c_fc)")],
)
def test_an_adapted_embedding_counts(kind: str, options: dict[str, Any], targets: str | list[str]) -> None:
    model, config = tiny_model(kind, options)
    found = plan(recipe_of(adapter={"rank": 5, "target_modules": targets}), config)
    assert isinstance(model, PreTrainedModel)
    assert found.targets == Lora(LoraSettings(rank=5, target_modules=targets)).inject(model)
    assert found.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_rank_that_grows_counts_as_it_ends() -> None:
    config, growth = LLAMA | {"model_type": "llama"}, [{"at": 0.5, "rank": 8}, {"at": 0.7, "rank": 12}]
    ends = plan(recipe_of(adapter={"rank": 12}), config)
    assert plan(recipe_of(adapter={"rank": 4, "growth": growth}), config).adapter_parameters == ends.adapter_parameters


@pytest.mark.parametrize(("bias", "extra"), [("none", 0), ("lora_only", 2 * 3 * 48), ("all", 1)])
def test_trained_biases(bias: str, extra: int) -> None:
    model, config = tiny_model("gpt2", GPT2)
    without = plan(recipe_of(adapter={"target_modules": ["c_attn"]}), config).trainable_parameters
    found = plan(recipe_of(adapter={"target_modules": ["c_attn"], "bias": bias}), config).trainable_parameters
    if bias == "all":
        extra = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert found - without == extra


@pytest.mark.parametrize("method", ["bottleneck", "prompt_tuning", "bitfit", "full"])
@pytest.mark.parametrize(("kind", "options"), CONFIGS)
def test_methods_beside_the_low_rank_ones(kind: str, options: dict[str, Any], method: str) -> None:
    model, config = tiny_model(kind, options)
    assert isinstance(model, PreTrainedModel)
    recipe = recipe_of(adapter={"method": method}, base={"model": "tiny", "quant": "none"})
    if method == "bitfit" and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        with pytest.raises(AdapterError, match=rf"nothing would be trained, as this {kind} model has no biases\. Take"):
            plan(recipe, config)
        return
    found = plan(recipe, config)
    stored = [] if method == "prompt_tuning" else None  # a model without weights has no vectors to start from
    assert METHODS[method](recipe.adapter).inject(model, stored) == found.targets
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert found.trainable_parameters == sum(trained)
    sizes, in_base = parts(found), method in ("bitfit", "full")
    assert sizes["adapter"] == (0 if in_base else 2 * sum(trained))
    assert sizes["gradients"] == sizes["low bits of bf16 weights"] == 2 * sum(trained)
    assert sizes["optimizer states"] == sum(optimizer_bytes(size, recipe.train.optimizer, "cuda") for size in trained)
    names = ("linear layers", "linear layers trained in full", "embeddings", "output head", "norms and biases")
    assert sum(sizes.get(name, 0) for name in names) == 2 * found.base_parameters


@pytest.mark.parametrize("method", ["adalora", "sora"])
def test_methods_that_prune(method: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    recipe = recipe_of(adapter={"method": method, "rank": 4, "dtype": "fp32"})
    found = plan(recipe, LLAMA | {"model_type": "llama"})
    own = METHODS[method](recipe.adapter)
    assert own.inject(model) == found.targets
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert found.trainable_parameters == sum(parameter.numel() for parameter in trained)
    model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    own.after_step(model, 1, 100, 0.1)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in own.state().values())
    assert parts(found).get("kept from step to step", 0) == kept and (kept > 0) == (method == "adalora")


def test_the_squares_that_dora_keeps_count() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    recipe = recipe_of(adapter={"method": "dora", "rank": 4})
    METHODS["dora"](recipe.adapter).inject(model)
    kept = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("row_squares"))
    assert parts(plan(recipe, LLAMA | {"model_type": "llama"}))["kept from step to step"] == kept > 0


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_tied_head_that_gets_an_adapter_is_copied(method: str) -> None:
    options = LLAMA | {"tie_word_embeddings": True}
    adapter = {"method": method, "rank": 4, "target_modules": ["lm_head", "q_proj"]}
    recipe = recipe_of(base={"model": "tiny", "quant": "none"}, adapter=adapter)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=torch.bfloat16)
    METHODS[method](recipe.adapter).inject(model)
    found = parts(plan(recipe, options | {"model_type": "llama"}))
    names = ("linear layers", "embeddings", "output head", "norms and biases")
    assert sum(found[name] for name in names) == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert found["output head"] == 2 * 160 * 96
    alone = recipe_of(base={"model": "tiny", "quant": "none"}, adapter=adapter | {"target_modules": ["q_proj"]})
    assert parts(plan(alone, options | {"model_type": "llama"}))["output head"] == 0


def test_an_embedding_on_the_host_takes_nothing_of_the_device() -> None:
    config = tiny_model("qwen2", LLAMA | {"tie_word_embeddings": False})[1]
    plain, hosted = (plan(recipe_of(base={"embeddings": place}), config) for place in ("device", "host"))
    assert parts(plain)["embeddings"] == 160 * 96 * 2 == plain.total_bytes - hosted.total_bytes
    assert parts(hosted) == parts(plain) | {"embeddings": 0} and hosted.host_bytes == 160 * 96 * 2
    (in_files,) = plan(recipe_of(base={"embeddings": "host"}), config, "cuda", "bf16").host
    assert in_files.mapped and in_files.bytes == hosted.host_bytes
    here = plan(recipe_of(base={"embeddings": "host"}), config, "cpu")
    assert here.host == [] and parts(here)["embeddings"] == parts(plain)["embeddings"]


def test_an_embedding_that_the_device_needs_is_refused() -> None:
    tied, untied = (tiny_model("llama", LLAMA | {"tie_word_embeddings": on})[1] for on in (True, False))
    with pytest.raises(
        ModelError, match=r"base\.embeddings=host: the output head is tied.*Set base\.embeddings=device"
    ):
        plan(recipe_of(base={"embeddings": "host"}), tied)
    for adapter in ({"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(AdapterError, match=r"embed_tokens\.weight is to be trained, and base\.embeddings=host"):
            plan(recipe_of(base={"embeddings": "host"}, adapter=adapter), untied)
