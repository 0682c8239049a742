"""AdaLoRA in a model, and against PEFT's: logits, gradients, penalty, budget, masks, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import assert_ships_as_lora, logits
from tiny_models import save_tiny_model, tiny_ids, tiny_model
from tiny_run import write_recipe

from qlora_kit.adapters.adalora import AdaLora, AdaLoraLinear
from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, read_adapter, save_adapter
from qlora_kit.adapters.settings import AdaLoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base
from qlora_kit.recipe_file import load_recipe
from qlora_kit.train.loop import train_step
from qlora_kit.train.optim import gradient_norm
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import start_session

SETTINGS = AdaLoraSettings(
    rank=2, init_rank=5, alpha=7.0, dtype="fp32", warmup_share=0.2, final_share=0.3, prune_every=2
)
STEPS = 20
PEFTS = {"target_r": 2, "init_r": 5, "lora_alpha": 7, "tinit": 4, "tfinal": 6, "deltaT": 2, "total_step": STEPS}


def adapted(arch: str = "llama", settings: AdaLoraSettings = SETTINGS) -> tuple[Any, AdaLora]:
    model, method = tiny_model(arch), AdaLora(settings)
    method.inject(model)
    return model, method


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(trainable_parameters(model).items()):
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def pefts(base: Any, **fields: Any) -> Any:
    config = peft.AdaLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **(PEFTS | fields))
    return peft.get_peft_model(base, config)


def own_weights(theirs: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's adapter weights by our names."""
    own = ("lora_A", "lora_B", "lora_E")
    named = theirs.base_model.model.named_parameters()
    return {name.removesuffix(".default"): weight for name, weight in named if name.split(".")[-2] in own}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_ours_in_peft_and_back(tmp_path: Path, arch: str) -> None:
    plain = logits(tiny_model(arch))
    ours, method = adapted(arch)
    assert torch.equal(logits(ours), plain)
    randomize(ours)
    assert (logits(ours) - plain).abs().max() > 0.1
    save_adapter(ours, method, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)

    loss = ours(tiny_ids(), labels=tiny_ids()).loss
    penalty = method.penalty(ours)
    assert penalty is not None
    (loss + penalty).backward()
    whole = theirs(input_ids=tiny_ids(), labels=tiny_ids()).loss
    torch.testing.assert_close(loss + penalty, whole, rtol=0, atol=1e-5)
    whole.backward()
    found = own_weights(theirs)
    for name, parameter in trainable_parameters(ours).items():
        torch.testing.assert_close(parameter.grad, found[name].grad, rtol=1e-4, atol=1e-5, msg=name)

    again = tiny_model(arch)
    loaded = load_adapter(again, tmp_path)
    assert isinstance(loaded, AdaLora) and loaded.settings.start_rank == 5
    assert torch.equal(logits(again), logits(ours))


def test_a_schedule_step_by_step_as_pefts() -> None:
    """Both train on their own gradients; importance, budget, pruned ranks and values stay together."""
    theirs = pefts(tiny_model("llama"))
    ours, method = adapted()
    for name, weight in own_weights(theirs).items():
        ours.get_parameter(name).data.copy_(weight.data)
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5) for model in (ours, theirs)
    ]
    allocator, layers = theirs.base_model.rankallocator, sum(1 for _ in adapted_layers(ours))
    for step in range(1, STEPS + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        ids = tiny_ids(seed=step)
        (ours(ids, labels=ids).loss + method.penalty(ours)).backward()
        theirs(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(ours, step, STEPS, 0.5)
        theirs.base_model.update_and_allocate(step)
        schedule = method.schedule(layers)
        if step <= schedule.fixed_from:
            assert schedule.ranks(step) == allocator.budget_schedule(step)[0]
        importance = method.importance
        assert set(importance.sensitivity) == {name.removesuffix(".default") for name in allocator.exp_avg_ipt}
        for name, value in importance.sensitivity.items():
            torch.testing.assert_close(value, allocator.exp_avg_ipt[f"{name}.default"], rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(
                importance.uncertainty[name], allocator.exp_avg_unc[f"{name}.default"], rtol=1e-2, atol=1e-7
            )
        for name, weight in own_weights(theirs).items():
            own = ours.get_parameter(name)
            torch.testing.assert_close(own, weight, rtol=1e-3, atol=1e-5)
            if name.endswith("lora_E"):
                assert torch.equal(own == 0, weight == 0), (step, name)
    kept = sum(int((layer.lora_E != 0).sum()) for layer in own_layers(ours))
    assert kept == 2 * layers


def own_layers(model: torch.nn.Module) -> list[AdaLoraLinear]:
    return [layer for _, layer in adapted_layers(model) if isinstance(layer, AdaLoraLinear)]


def test_a_pruned_adapter_of_pefts_is_read(tmp_path: Path) -> None:
    theirs = pefts(tiny_model("llama"))
    randomize(theirs)
    names = [name for name in own_weights(theirs) if name.endswith("lora_E")]
    pattern = {name: [True, False, True, False, False] for name in names} | {names[0]: [False] * 5}
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    theirs.save_pretrained(str(tmp_path))
    assert len(read_adapter(tmp_path).tensors) == 3 * len(names)
    ours = tiny_model("llama")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)

    path = tmp_path / "adapter_config.json"
    tree = json.loads(path.read_text())
    tree["rank_pattern"][names[1]] = [True] * 5
    path.write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match=rf"rank_pattern of {names[1]} does not fit"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_r", 6, "init_rank 5 is less than rank 6"),
        ("target_r", 0, "target_r: input should be greater than or equal to 1"),
        ("beta1", 1.0, "beta1: input should be less than 1"),
        ("deltaT", "often", "deltaT: input should be a valid integer"),
        ("tfinal", None, "a field has a wrong type"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any, words: str) -> None:
    model, method = adapted()
    save_adapter(model, method, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(AdapterError, match=words):
        load_adapter(tiny_model("llama"), tmp_path)


def prune(model: Any, keep: dict[str, list[int]], otherwise: list[int]) -> None:
    """Closes all ranks but those named, by the last part of a layer's name."""
    for name, layer in adapted_layers(model):
        assert isinstance(layer, AdaLoraLinear)
        closed = torch.ones(layer.rank, dtype=torch.bool)
        closed[keep.get(name.rsplit(".", 1)[-1], otherwise)] = False
        layer.lora_E.data[closed] = 0.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_ships_computes_the_same_with_fewer_ranks(tmp_path: Path, dtype: str) -> None:
    ours, method = adapted(settings=SETTINGS.model_copy(update={"dtype": dtype}))
    randomize(ours)
    prune(ours, {"q_proj": [], "down_proj": [0, 3, 4], "v_proj": [2]}, [1, 4])
    save_adapter(ours, method, tmp_path / "checkpoint", "tiny")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    method.publish(tmp_path / "checkpoint", shipped)

    config = json.loads((shipped / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    assert set(config["rank_pattern"].values()) == {1, 3}
    assert not any("q_proj" in name for name in config["target_modules"])
    ranks = {key: len(t) for key, t in read_adapter(shipped).tensors.items() if "lora_A" in key}
    assert {key.split(".")[-3]: rank for key, rank in ranks.items()} == {
        "k_proj": 2, "v_proj": 1, "o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 3
    }  # fmt: skip
    assert size(shipped) < 0.6 * size(tmp_path / "checkpoint")

    assert_ships_as_lora(shipped, logits(ours), dtype)


def size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def test_a_layer_whose_bias_is_trained_stays(tmp_path: Path) -> None:
    changes = {"bias": "lora_only", "modules_to_save": ["ln_f"]}  # PEFT loads what is trained in full too
    ours, method = adapted("gpt2", SETTINGS.model_copy(update=changes))
    randomize(ours)
    prune(ours, {"c_attn": []}, [0])
    save_adapter(ours, method, tmp_path / "checkpoint", "tiny")
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    method.publish(tmp_path / "checkpoint", shipped)
    theirs = peft.PeftModel.from_pretrained(tiny_model("gpt2"), str(shipped))
    again = tiny_model("gpt2")
    load_adapter(again, shipped)
    for other in (theirs, again):
        torch.testing.assert_close(logits(other), logits(ours), rtol=0, atol=1e-5)


def test_an_adapter_without_a_rank_is_not_shipped(tmp_path: Path) -> None:
    ours, method = adapted()
    prune(ours, {}, [])
    save_adapter(ours, method, tmp_path / "checkpoint", "tiny")
    with pytest.raises(AdapterError, match=r"every rank of every layer was pruned.*Raise adapter\.rank"):
        method.publish(tmp_path / "checkpoint", tmp_path)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_on_a_quantized_base_merged_alike(tmp_path: Path, quant: str) -> None:
    save_tiny_model(tmp_path / "base")
    ours = load_base(find_base(str(tmp_path / "base")), quant, compute_dtype=torch.float32)
    AdaLora(SETTINGS).inject(ours)
    randomize(ours)
    before = logits(ours)
    merge_adapter(ours)
    assert not list(adapted_layers(ours))
    torch.testing.assert_close(logits(ours), before, rtol=0, atol=1e-5)


def test_ranks_go_where_they_are_needed() -> None:
    """The teacher differs from the base in one layer only."""
    needy = "model.layers.1.mlp.down_proj"
    teacher = tiny_model("llama")
    teacher.get_submodule(needy).weight.data.add_(
        0.3 * torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    )
    torch.manual_seed(0)
    settings = {
        "rank": 2,
        "init_rank": 4,
        "warmup_share": 0.1,
        "final_share": 0.3,
        "prune_every": 5,
        "orth_weight": 0.1,
    }
    ours, method = adapted(settings=SETTINGS.model_copy(update=settings))
    optimizer = torch.optim.Adam(trainable_parameters(ours).values(), lr=0.02)
    steps = 60
    for step in range(1, steps + 1):
        ids = tiny_ids(seed=step, rows=4)
        with torch.no_grad():
            wanted = teacher(ids).logits
        loss = (ours(ids).logits - wanted).square().mean()
        (loss + method.penalty(ours)).backward()
        optimizer.step()
        method.after_step(ours, step, steps, 0.02)
        optimizer.zero_grad()
    kept = {name: int((layer.lora_E != 0).sum()) for name, layer in zip(dict(adapted_layers(ours)), own_layers(ours))}
    assert sum(kept.values()) == 2 * len(kept)
    assert kept[needy] == 4 == max(kept.values())
    assert min(kept.values()) < 2


def test_importance_is_that_of_clipped_gradients() -> None:
    states = []
    for factor in (0.25, 1.0):
        torch.manual_seed(0)
        ours, method = adapted()
        randomize(ours)
        ours(tiny_ids(), labels=tiny_ids()).loss.backward()
        if factor == 1.0:
            for parameter in trainable_parameters(ours).values():
                parameter.grad *= 0.25
        method.after_step(ours, 1, STEPS, 0.1, factor)
        states.append(method.state())
    assert states[0].keys() == states[1].keys() and any(value.any() for value in states[0].values())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_run_hands_the_factor_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    adapter = {"method": "adalora", "rank": 2, "alpha": 4.0, "dropout": 0.0}
    recipe = load_recipe(str(write_recipe(tmp_path, model, adapter=adapter, train={"max_grad_norm": 0.001})))
    session = start_session(recipe, RunFolder.create(recipe))
    norms = []

    def look(model: Any, step: int, total_steps: int, lr: float, clip_factor: float) -> None:
        norms.append(clip_factor * gradient_norm(list(trainable_parameters(model).values())))

    monkeypatch.setattr(session.method, "after_step", look)
    assert train_step(session, 1).grad_norm > 0.01
    assert norms == [pytest.approx(0.001, rel=1e-5)]


def test_a_run_goes_on_from_its_state_to_the_bit() -> None:
    def run(model: Any, method: AdaLora, first: int, last: int) -> None:
        for step in range(first, last + 1):
            ids = tiny_ids(seed=step)
            model(ids, labels=ids).loss.backward()
            with torch.no_grad():
                for parameter in trainable_parameters(model).values():
                    parameter -= 0.5 * parameter.grad
            method.after_step(model, step, 10, 0.5)
            model.zero_grad()

    for stop in (3, 6, 8):  # in the warm-up and the fall; before and in the final phase, which begins at 7
        torch.manual_seed(0)
        whole, method = adapted(settings=SETTINGS.model_copy(update={"prune_every": 1}))
        run(whole, method, 1, stop)
        torch.manual_seed(1)
        resumed, later = adapted(settings=method.settings)
        resumed.load_state_dict(whole.state_dict())
        later.load_state({name: value.clone() for name, value in method.state().items()})
        run(whole, method, stop + 1, 10)
        run(resumed, later, stop + 1, 10)
        assert method.state().keys() == later.state().keys() and all("kept/" in name for name in method.state())
        for name, parameter in trainable_parameters(resumed).items():
            assert torch.equal(parameter, whole.get_parameter(name)), (stop, name)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_a_short_run_still_ends_within_its_budget(total: int, tmp_path: Path) -> None:
    ours, method = adapted(settings=SETTINGS.model_copy(update={"warmup_share": 0.45, "final_share": 0.5}))
    randomize(ours)
    for step in range(1, total + 1):
        ours(tiny_ids(seed=step), labels=tiny_ids(seed=step)).loss.backward()
        method.after_step(ours, step, total, 0.1)
        ours.zero_grad()
    assert sum(int((layer.lora_E != 0).sum()) for layer in own_layers(ours)) == 2 * len(own_layers(ours))
    save_adapter(ours, method, tmp_path, "tiny")
    peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path), is_trainable=True)  # it checks the phases


def test_values_stay_exact_beside_bf16_vectors() -> None:
    ours, _ = adapted(settings=SETTINGS.model_copy(update={"dtype": "bf16"}))
    for layer in own_layers(ours):
        assert layer.lora_E.dtype == torch.float32 and layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
