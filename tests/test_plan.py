"""The plan's arithmetic against models that transformers and bitsandbytes really build."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_models import CONFIGS, LLAMA, parts, recipe_of, tiny_model
from rich.console import Console
from tiny_models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.methods import METHODS
from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.model.int4_blocks import Int4Grid
from qlora_kit.model.load import load_base
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base
from qlora_kit.plan import ARCHITECTURES, device_here, find_config, model_shapes, plan, print_plan
from qlora_kit.plan.memory import Device, optimizer_bytes
from qlora_kit.plan.show_bytes import format_bytes
from qlora_kit.recipe import BaseSection
from qlora_kit.recipe_file import load_recipe
from qlora_kit.train.adapted_model import add_gradients_in_fp32


@pytest.mark.parametrize(("kind", "options"), CONFIGS)
def test_names_and_sizes_are_those_of_the_model(kind: str, options: dict[str, Any]) -> None:
    model, config = tiny_model(kind, options)
    shapes = model_shapes(config)
    assert shapes.parameters() == {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert {linear.name for linear in [*shapes.linears, shapes.head]} == layers


def test_every_architecture_is_compared_with_a_model() -> None:
    assert {kind for kind, _ in CONFIGS} == set(ARCHITECTURES)


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "base",
    [
        {"quant": "nf4", "double_quant": True},
        {"quant": "nf4", "double_quant": False},
        {"quant": "fp4", "double_quant": True},
        {"quant": "int8"},
        {"quant": "none", "compute_dtype": "fp32"},
    ],
    ids=lambda base: "-".join(str(value) for value in base.values()),
)
def test_base_bytes_are_those_bitsandbytes_stores(base: dict[str, Any], saved_llama: Path) -> None:
    options: dict[str, Any] = {"load_in_8bit": True}
    if base["quant"] in ("nf4", "fp4"):
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": base["quant"]}
        options["bnb_4bit_use_double_quant"] = base["double_quant"]
    quantization = None if base["quant"] == "none" else BitsAndBytesConfig(**options)
    dtype = torch.float32 if base.get("compute_dtype") == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        saved_llama, dtype=dtype, quantization_config=quantization, device_map="cpu"
    )
    tensors = list(model.parameters())
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        elif getattr(weight, "SCB", None) is not None:
            tensors.append(weight.SCB)  # type: ignore[attr-defined]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    found = plan(recipe_of(base={"model": "tiny", **base}), find_config(BaseSection(model=str(saved_llama))))
    names = ("linear layers", "embeddings", "output head", "norms and biases")
    assert sum(parts(found)[name] for name in names) == stored


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_base_bytes_of_int4_are_those_of_its_blocks(block_size: int, saved_llama: Path) -> None:
    grid = Int4Grid(block_size, "rtn")
    model = load_base(find_base(str(saved_llama)), "int4", compute_dtype=torch.bfloat16, grid=grid)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    stored += sum(module.stored_bytes() for module in model.modules() if isinstance(module, QuantizedLinear))
    base = {"model": "tiny", "quant": "int4", "block_size": block_size}
    found = plan(recipe_of(base=base), find_config(BaseSection(model=str(saved_llama))))
    names = ("linear layers", "embeddings", "output head", "norms and biases")
    assert sum(parts(found)[name] for name in names) == stored


@pytest.mark.parametrize("head", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_bytes_of_a_coded_head_are_those_that_are_stored(tmp_path: Path, tie: bool, kind: str, head: str) -> None:
    save_tiny_model(tmp_path, kind, tie)
    model = load_base(find_base(str(tmp_path)), "nf4", compute_dtype=torch.bfloat16, head_quant=head)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    stored += sum(module.stored_bytes() for module in model.modules() if isinstance(module, QuantizedLinear))
    recipe = recipe_of(base={"model": "tiny", "head_quant": head})
    found = plan(recipe, find_config(BaseSection(model=str(tmp_path))))
    names = ("linear layers", "embeddings", "output head", "norms and biases")
    assert sum(parts(found)[name] for name in names) == stored
    note = next(part.note for part in found.components if part.name == "output head")
    assert note.startswith(f"{head}; ") and ("the embedding reads it too" in note) == tie
    assert plan(recipe, find_config(BaseSection(model=str(tmp_path))), "cpu", "bf16").mapped_bytes < stored


@pytest.mark.parametrize("weights", [100, 4095, 4096, 5000, 8192])
@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw"])
def test_optimizer_bytes_are_those_of_bitsandbytes(weights: int, kind: str) -> None:
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.zeros(weights))
    parameter.grad = torch.ones(weights)
    make = bitsandbytes.optim.AdamW8bit if kind == "adamw_8bit" else torch.optim.AdamW
    optimizer = make([parameter], lr=1e-3)
    optimizer.step()
    entries = [value for key, value in optimizer.state[parameter].items() if key != "step"]
    assert optimizer_bytes(weights, kind, "cuda") == sum(entry.numel() * entry.element_size() for entry in entries)


def test_adapter_arithmetic_by_hand() -> None:
    config = LLAMA | {"model_type": "llama"}
    adapter = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    found = plan(recipe_of(adapter=adapter, train={"max_steps": 1, "optimizer": "adamw"}), config)
    weights = 2 * 4 * ((96 + 160) + (96 + 80))
    assert found.adapter_parameters == found.trainable_parameters == weights
    assert len(found.targets) == 4
    sizes = parts(found)
    assert sizes["adapter"] == sizes["low bits of bf16 weights"] == sizes["gradients"] == 2 * weights
    assert sizes["optimizer states"] == 8 * weights
    in_fp32 = parts(plan(recipe_of(adapter=adapter | {"dtype": "fp32"}), config))
    assert in_fp32["adapter"] == in_fp32["gradients"] == 4 * weights and in_fp32["low bits of bf16 weights"] == 0
    assert parts(plan(recipe_of(adapter=adapter | {"keep_precision": False}), config))["low bits of bf16 weights"] == 0


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "sora", "bottleneck", "bitfit"])
def test_adapter_and_gradient_bytes_are_those_of_the_tensors(method: str, micro_batches: int) -> None:
    options = LLAMA | {"attention_bias": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=torch.bfloat16)
    in_base = sum(parameter.numel() for parameter in model.parameters())
    train = {"max_steps": 1, "grad_accum_steps": micro_batches}
    recipe = recipe_of(adapter={"method": method}, base={"model": "tiny", "quant": "none"}, train=train)
    METHODS[method](recipe.adapter).inject(model)
    trained = trainable_parameters(model)
    if micro_batches > 1:
        add_gradients_in_fp32(trained)
    ids = torch.arange(6)[None]
    for _ in range(micro_batches):
        model(ids, labels=ids).loss.backward()
    found = parts(plan(recipe, options | {"model_type": "llama"}))
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    assert len(gradients) == len(trained)
    assert found["gradients"] == sum(gradient.nbytes for gradient in gradients)
    of_adapter = [p for name, p in model.named_parameters() if p.requires_grad and method != "bitfit"]
    assert found["adapter"] == sum(parameter.nbytes for parameter in of_adapter)
    low = sum(2 * parameter.numel() for parameter in trained.values() if parameter.dtype == torch.bfloat16)
    assert found["low bits of bf16 weights"] == low
    assert sum(parameter.numel() for parameter in model.parameters()) - in_base == sum(p.numel() for p in of_adapter)


def test_the_readmes_7b_table() -> None:
    """Mistral 7B's config, as its hub has it."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32768}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"model_type": "mistral", "tie_word_embeddings": False} | sizes | heads
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = plan(load_recipe("mistral-7b-laptop"), config)
    size = parts(found)
    for name, total in {
        "linear layers": size["linear layers"],
        "embeddings, output head": size["embeddings"] + size["output head"],
        "adapter, with low bits": size["adapter"] + size["low bits of bf16 weights"],
        "gradients": size["gradients"],
        "optimizer states": size["optimizer states"],
        "stored": found.exact_bytes,
        "in use": found.in_use_bytes,
        "total": found.total_bytes,
    }.items():
        assert re.search(rf"^    {name} +{re.escape(format_bytes(total))}\b", text, re.M), name
    longest = plan(load_recipe("mistral-7b-laptop", ["data.max_seq_len=4096"]), config)
    assert f"the same plan says {format_bytes(longest.total_bytes)}," in text


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_layers_own_settings_must_match_a_target(field: str) -> None:
    config, adapter = LLAMA | {"model_type": "llama"}, {"target_modules": ["q_proj", "v_proj"]}
    plan(recipe_of(adapter=adapter | {field: {"layers.0.self_attn.q_proj": 4, r".*1.*v_proj": 2}}), config)
    with pytest.raises(AdapterError, match=rf"{field} matches no layer .*'q_prj'.*Allowed: q_proj, v_proj.*q_proj\?"):
        plan(recipe_of(adapter=adapter | {field: {"q_prj": 4}}), config)
    with pytest.raises(AdapterError, match=rf"{field} matches no layer that gets an adapter \(got 'k_proj'\)"):
        plan(recipe_of(adapter=adapter | {field: {"k_proj": 4}}), config)


def test_the_device_of_this_machine() -> None:
    assert device_here() == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("device", "line"), [("cpu", "a CPU, as it has no GPU; --device cuda"), ("cuda", "its GPU; --")]
)
def test_the_first_line_tells_a_device_that_was_found(device: Device, line: str) -> None:
    console = Console(file=StringIO(), width=140)
    print_plan(plan(recipe_of(), LLAMA | {"model_type": "llama"}, device), console, found_here=True)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().startswith(f"For this machine: {line}")


@pytest.mark.parametrize("name", ["all-linear", r".*\.(q|k)_proj", ["down_proj"], ["model.layers.1.mlp.up_proj"]])
def test_targets_match_names_as_peft_does(name: str | list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model, config = tiny_model("llama", LLAMA)
    targets = plan(recipe_of(adapter={"target_modules": name}), config).targets
    wrapped = get_peft_model(model, LoraConfig(target_modules=name, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    ends = "base_model.model.", ".lora_A.default"
    found = [
        key.removeprefix(ends[0]).removesuffix(ends[1]) for key, _ in wrapped.named_modules() if key.endswith(ends[1])
    ]
    assert targets == found


def test_eight_bit_optimizer_needs_cuda() -> None:
    config = LLAMA | {"model_type": "llama"}
    recipe = recipe_of(adapter={"rank": 64})
    on_cpu, on_cuda = plan(recipe, config, "cpu"), plan(recipe, config)
    assert parts(on_cpu)["optimizer states"] == 8 * on_cpu.trainable_parameters
    assert parts(on_cuda)["optimizer states"] < parts(on_cpu)["optimizer states"] / 3
    note = next(part.note for part in on_cpu.components if part.name == "optimizer states")
    assert "needs CUDA" in note


def test_json_and_table_name_the_sums() -> None:
    found = plan(recipe_of(), LLAMA | {"model_type": "llama"})
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["total_bytes"] == max(sum(moment["parts"].values()) for moment in tree["moments"])
    assert tree["exact_bytes"] == sum(part["bytes"] for part in tree["components"])
    console = Console(file=StringIO(), width=140)
    print_plan(found, console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    for word in ("linear layers", "nf4, double", "optimizer states", "training step", "total", "KiB", "FLOP a token"):
        assert word in text


@pytest.mark.parametrize(
    ("error", "config", "adapter", "match"),
    [
        (ModelError, {"model_type": "t5"}, {}, r"architecture \(got 't5'\)\. Allowed: llama, mistral"),
        (ModelError, {}, {}, r"architecture \(got None\)"),
        (ModelError, {"model_type": "llama"}, {}, "no usable hidden_size"),
        (ModelError, LLAMA | {"model_type": "llama", "vocab_size": "many"}, {}, "vocab_size.*'many'"),
        (AdapterError, None, {"target_modules": ["w_proj"]}, "matches no layer.*'w_proj'.*Allowed: down_proj"),
        (AdapterError, None, {"target_modules": "nothing"}, "matches no layer"),
        (AdapterError, None, {"target_modules": "("}, "no regular expression"),
        (AdapterError, None, {"modules_to_save": ["score"]}, "modules_to_save matches no module.*'score'"),
        (
            AdapterError,
            None,
            {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.self_attn"]},
            "both a target and a module to save",
        ),
        (
            AdapterError,
            None,
            {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]},
            "both a target and a module to save",
        ),
    ],
)
def test_wrong_input_is_named(error: type[Exception], config: dict | None, adapter: dict, match: str) -> None:
    with pytest.raises(error, match=match):
        plan(recipe_of(adapter=adapter), LLAMA | {"model_type": "llama"} if config is None else config)


@pytest.mark.parametrize("adapter", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_coded_head_is_not_trained(adapter: dict[str, Any]) -> None:
    config = LLAMA | {"model_type": "llama", "tie_word_embeddings": True}
    with pytest.raises(AdapterError, match=r"weight is to be trained, and base.head_quant holds it.*head_quant=none"):
        plan(recipe_of(adapter=adapter, base={"head_quant": "int8"}), config)


def test_planning_imports_no_torch() -> None:
    script = "import sys, qlora_kit.plan; raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_teacher_counts() -> None:
    config = LLAMA | {"model_type": "llama"}
    whole = parts(plan(recipe_of(base={"quant": "none"}), config))
    unquantized = sum(whole[name] for name in ("linear layers", "embeddings", "output head", "norms and biases"))
    alone = plan(recipe_of(), config).total_bytes
    guided = plan(recipe_of(train={"distill": {}}), config)
    assert parts(guided)["teacher"] == unquantized == guided.total_bytes - alone
    (asked_once,) = (
        part for part in plan(recipe_of(train={"distill": {"top_k": 4}}), config).components if part.name == "teacher"
    )
    assert asked_once.bytes == 0 and "only before the first step" in asked_once.note
    (other,) = (
        part
        for part in plan(recipe_of(train={"distill": {"teacher": "x/y"}}), config).components
        if part.name == "teacher"
    )
    assert not other.exact and "not counted: x/y" in other.note
