"""The plan's moments against what autograd keeps and what torch allocates in a real step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planned_models import recipe_of
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.settings import AdapterSettings, DoraSettings, LoraSettings
from qlora_kit.kernels.offloaded_inputs import offload_inputs
from qlora_kit.model.quantize import plan_quantization, quantize_planned
from qlora_kit.model.quantized_head import put_coded_head, quantize_head
from qlora_kit.plan import model_shapes, plan
from qlora_kit.plan.decoder_layer import Batch, kept_bytes
from qlora_kit.plan.layer_shape import layer_shapes
from qlora_kit.plan.step import INPUTS, evaluation_tape, training_tape
from qlora_kit.plan.tape import Tape
from qlora_kit.plan.trained import find_targets
from qlora_kit.tasks.loss import token_losses

WIDE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 450,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def built(kind: str, batch: Batch, settings: AdapterSettings, **options: Any) -> tuple[Any, Any, Any]:
    """(model with adapter in training mode, its shapes, its layers in the plan)."""
    config = AutoConfig.for_model(kind, **WIDE | options)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[batch.width])
    model.requires_grad_(False)
    plan_quantization(model, batch.quant, True, None)
    if batch.quant != "none":
        quantize_planned(model, [])
    if batch.head_quant != "none":
        head = model.get_output_embeddings()
        put_coded_head(model, quantize_head(head.weight, batch.head_quant, True, None), head.weight.dtype)
    method_for(settings).inject(model)
    shapes = model_shapes(json.loads(config.to_json_string(use_diff=False)))
    targets = find_targets(shapes, settings.wanted_layers)
    return model.train(), shapes, layer_shapes(shapes, targets, settings)


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 300, (batch.rows, batch.length))
    mask = torch.ones_like(ids)
    mask[-1, -9:] = 0  # padding behind the tokens costs no mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def kept_by_autograd(model: Any, batch: Batch) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(model, inputs_of(batch))
    return sum(storage.nbytes() for storage in kept.values())


def batch_of(**changes: Any) -> Batch:
    return Batch(
        **{"rows": 2, "length": 64, "width": 2, "dropout": False, "quant": "nf4", "gradient_width": 2} | changes
    )


@pytest.mark.parametrize(
    ("kind", "batch", "targets", "options"),
    [
        ("llama", batch_of(), "all-linear", {}),
        ("llama", batch_of(width=4, quant="int8"), "all-linear", {"num_key_value_heads": 5}),
        ("llama", batch_of(quant="none"), ["q_proj", "v_proj"], {}),
        ("llama", batch_of(rows=3), ["down_proj"], {}),
        ("llama", batch_of(rows=3, length=33), "all-linear", {}),
        (
            "llama",
            batch_of(rows=3),
            "all-linear",
            {"num_attention_heads": 4, "num_key_value_heads": 2},
        ),
        ("mistral", batch_of(rows=1, length=50), "all-linear", {}),
        ("qwen2", batch_of(), "all-linear", {}),
        ("qwen3", batch_of(), "all-linear", {"head_dim": 32}),
        ("phi3", batch_of(), "all-linear", {}),
        ("llama", batch_of(dropout=True), "all-linear", {}),
    ],
)
def test_a_layer_keeps_what_the_plan_says(
    kind: str, batch: Batch, targets: str | list[str], options: dict[str, Any]
) -> None:
    """To the byte: what one layer more keeps."""
    settings = LoraSettings(rank=8, dropout=0.1 if batch.dropout else 0.0, target_modules=targets)
    sizes = []
    for layers in (2, 3):
        model, _, planned = built(kind, batch, settings, **options | {"num_hidden_layers": layers})
        sizes.append(kept_by_autograd(model, batch))
    assert sizes[1] - sizes[0] == kept_bytes(planned[0], batch)


def test_dora_keeps_the_output_of_each_layer_too() -> None:
    """Beside a few numbers a row, which are not counted."""
    batch, sizes = batch_of(), []
    for layers in (2, 3):
        model, _, planned = built("llama", batch, DoraSettings(rank=8), num_hidden_layers=layers)
        sizes.append(kept_by_autograd(model, batch))
    assert sizes[1] - sizes[0] == pytest.approx(kept_bytes(planned[0], batch), rel=0.02)


def allocated_peak(step: Callable[[], None]) -> int:
    """The most that torch held during `step`, above what it did before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    kineto: Any = recorded.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize(
    ("batch", "vocab"),
    [
        (batch_of(rows=4, length=512), 300),
        (batch_of(rows=2, length=512), 300),
        (batch_of(rows=2, length=512, width=4, gradient_width=4), 300),
        (batch_of(rows=2, length=256), 40000),
        (batch_of(rows=2, length=256, head_quant="nf4"), 160000),
        (batch_of(rows=2, length=256, head_quant="int8", width=4, gradient_width=4), 160000),
    ],
)
def test_the_peak_of_a_step_is_the_plans(batch: Batch, vocab: int, checkpointed: bool) -> None:
    settings = LoraSettings(rank=8, dtype="bf16" if batch.width == 2 else "fp32")
    model, shapes, layers = built("llama", batch, settings, vocab_size=vocab)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_of(batch)

    def step() -> None:
        token_losses(model, inputs)[0].sum().backward()
        model.zero_grad()

    planned = training_tape({}, shapes, layers, batch, checkpointed, whole_logits=False).peak_bytes
    assert planned == pytest.approx(allocated_peak(step), rel=0.05)


@pytest.mark.parametrize(("layers", "length"), [(2, 512), (3, 2048), (8, 512)])
def test_of_offloaded_inputs_two_are_on_the_device(layers: int, length: int) -> None:
    """The host's part is there before the step that is measured."""
    batch = batch_of(rows=2, length=length)
    model, shapes, planned = built("llama", batch, LoraSettings(rank=8), num_hidden_layers=layers)
    model.activation_checkpointing_enable({"use_reentrant": False})
    offload_inputs(model, torch.device("cpu"))
    inputs = inputs_of(batch)

    def step() -> None:
        token_losses(model, inputs)[0].sum().backward()
        model.zero_grad()

    plain, tape = (training_tape({}, shapes, planned, batch, True, False, offloaded) for offloaded in (False, True))
    assert tape.peak[INPUTS] == plain.peak[INPUTS] * min(1, 2 / layers)
    assert tape.peak_bytes == pytest.approx(allocated_peak(step), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "batch", "vocab"),
    [
        ("llama", batch_of(rows=4, length=512), 300),
        ("llama", batch_of(rows=2, length=512), 300),
        ("llama", batch_of(rows=2, length=512, width=4), 300),
        ("llama", batch_of(rows=2, length=256), 40000),
        ("llama", batch_of(rows=2, length=256, head_quant="int8"), 160000),
        ("phi3", batch_of(rows=4, length=512), 300),
        ("qwen2", batch_of(rows=4, length=512, quant="int8"), 300),
    ],
)
def test_the_peak_of_an_evaluation_is_the_plans(kind: str, batch: Batch, vocab: int) -> None:
    model, shapes, layers = built(kind, batch, LoraSettings(rank=8), vocab_size=vocab)
    inputs = inputs_of(batch)

    @torch.no_grad()
    def score() -> None:
        token_losses(model.eval(), inputs)

    planned = evaluation_tape({}, shapes, layers, batch).peak_bytes
    assert planned == pytest.approx(allocated_peak(score), rel=0.05)


def test_a_tape_keeps_its_highest_moment() -> None:
    tape = Tape({"weights": 10})
    tape.take("a", 5)
    tape.brief("b", 7)
    tape.give("a", 5)
    tape.take("c", 3)
    assert tape.peak == {"weights": 10, "a": 5, "b": 7} and tape.peak_bytes == 22
    assert dict(tape.held) == {"weights": 10, "a": 0, "b": 0, "c": 3}


CONFIG = WIDE | {"model_type": "llama", "num_hidden_layers": 12}


def moments_of(**sections: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {moment.name: moment.parts for moment in plan(recipe_of(**sections), CONFIG, "cpu").moments}


def test_checkpointing_saves() -> None:
    sizes = []
    for on in (True, False):
        train = {"max_steps": 1, "gradient_checkpointing": on}
        parts = moments_of(data={"train": "t", "max_seq_len": 512}, train=train)["training step"]
        sizes.append(parts["activations kept"] + parts.get("layer inputs kept", 0))
    assert sizes[0] < sizes[1] / 5


def test_a_checkpoint_copies_adapter_and_states() -> None:
    parts = moments_of()["checkpoint"]
    copied = sum(parts[name] for name in ("adapter", "low bits of bf16 weights", "optimizer states"))
    assert parts["copies while saving"] == copied


def test_gradients_of_earlier_micro_batches_are_there_from_the_start() -> None:
    def gradients(accum: int) -> int:
        train = {"max_steps": 1, "grad_accum_steps": accum, "gradient_checkpointing": False}
        return moments_of(data={"train": "t", "max_seq_len": 512}, train=train)["training step"].get("gradients", 0)

    trained = plan(recipe_of(), CONFIG, "cpu").trainable_parameters
    assert gradients(2) == 4 * trained and gradients(1) < trained


def test_what_is_stored_as_it_is_used_stays_mapped() -> None:
    recipe = recipe_of(base={"quant": "nf4"})
    mapped, copied = plan(recipe, CONFIG, "cpu", "bf16"), plan(recipe, CONFIG, "cpu", "fp32")
    plain = sum(
        part.bytes for part in copied.components if part.name in ("embeddings", "output head", "norms and biases")
    )
    assert mapped.mapped_bytes == plain == copied.total_bytes - mapped.total_bytes and copied.mapped_bytes == 0
    assert plan(recipe, CONFIG, "cuda", "bf16").mapped_bytes == 0


def test_offloaded_inputs_are_on_the_host_where_that_is_another() -> None:
    found = {}
    for again, device in ((True, "cuda"), ("offload", "cuda"), ("offload", "cpu")):
        train = {"max_steps": 1, "gradient_checkpointing": again, "micro_batch_size": 4}
        found[again, device] = plan(recipe_of(data={"train": "t", "max_seq_len": 2048}, train=train), CONFIG, device)
    plain, offloaded, here = found.values()
    (part,) = offloaded.host
    size = 4 * 2048 * 160 * 2  # of one layer's input
    assert part.name == "layer inputs" and "pinned" in part.note
    assert offloaded.host_bytes == 12 * 2**22 and size < 2**22
    assert plain.total_bytes - offloaded.total_bytes == pytest.approx(10 * size, rel=0.05)
    assert plain.host == here.host == [] and here.moments[0].parts[INPUTS] == plain.moments[0].parts[INPUTS]
    assert offloaded.to_json()["host_bytes"] == offloaded.host_bytes
