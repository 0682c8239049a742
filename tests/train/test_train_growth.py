"""LoRA that grows while it trains: the function stays, the run resumes to the bit, PEFT reads what comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import logits, randomize
from tiny_models import save_tiny_model, tiny_ids, tiny_model
from tiny_run import killed_after, train, write_recipe
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import save_adapter
from qlora_kit.adapters.settings import GrowthStage, LoraSettings
from qlora_kit.cli import main
from qlora_kit.recipe import TrainSection
from qlora_kit.train.growth import EAGERNESS, HIGHEST_GAIN, catch_up
from qlora_kit.train.optim import AdapterOptimizer, optimizer_maker
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

STAGES = [{"at": 0.3, "rank": 5}, {"at": 0.6, "rank": 12}]
ADAPTER = {"rank": 4, "alpha": 8.0, "growth": STAGES}


def growing(**changes: Any) -> LoraSettings:
    stages = [GrowthStage(at=0.5, rank=8), GrowthStage(at=0.75, rank=16)]
    return LoraSettings(rank=4, alpha=8.0, growth=stages, dtype="fp32").model_copy(update=changes)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3.0}}, {"dtype": "bf16"}])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_growth_leaves_the_function_where_it_is(tmp_path: Path, changes: dict[str, Any], targets: Any) -> None:
    model = tiny_model("llama")
    method = Lora(growing(target_modules=targets, **changes))
    method.inject(model)
    assert method.resize(model, 4, 10) == {}
    randomize(model)
    before, scaling = logits(model), [layer.scaling for _, layer in adapted_layers(model)]
    for step, rank in ((5, 8), (7, 8), (8, 16)):
        changed = method.resize(model, step, 10, lambda: 3.0)
        assert set(changed) == (set() if step == 7 else set(trainable_parameters(model)))
        assert {layer.rank for _, layer in adapted_layers(model)} == {rank}
        assert torch.equal(logits(model), before)
    assert [layer.scaling for _, layer in adapted_layers(model)] == scaling
    save_adapter(model, method, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    torch.testing.assert_close(logits(theirs), before, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16


@pytest.mark.parametrize(("start", "end"), [(4, 16), (3, 5), (1, 2), (16, 48)])
def test_growth_moves_no_bit_at_the_widths_of_real_models(start: int, end: int) -> None:
    """Where a product of 4 ranks sums in another order than one of 16."""
    model = tiny_model("llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    method = Lora(growing(rank=start, growth=[GrowthStage(at=0.5, rank=end)]))
    method.inject(model)
    randomize(model)
    before = logits(model)
    method.resize(model, 6, 10)
    assert torch.equal(logits(model), before)


def test_new_rows_learn_at_once() -> None:
    model = tiny_model("llama")
    method = Lora(growing())
    method.inject(model)
    randomize(model)
    method.resize(model, 9, 10)
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    for _, layer in adapted_layers(model):
        assert layer.lora_A[4:].abs().min() > 0 and not layer.lora_B[:, 4:].any()
        assert layer.lora_B.grad[:, 4:].abs().max() > 0


def test_new_rows_are_as_much_larger_as_what_they_missed() -> None:
    largest = []
    for gain in (1.0, 2.5):
        model, method = tiny_model("llama"), Lora(growing())
        method.inject(model)
        torch.manual_seed(3)
        method.resize(model, 9, 10, lambda of=gain: of)
        largest.append([layer.lora_A[4:].detach() for _, layer in adapted_layers(model)])
    for small, large in zip(*largest, strict=True):
        torch.testing.assert_close(large, 2.5 * small)


@pytest.mark.parametrize(
    ("changes", "step", "gain"),
    [
        ({"schedule": "constant", "betas": [0.0, 0.99]}, 30, EAGERNESS * 100 / 70),
        ({"schedule": "constant", "betas": [0.0, 0.99], "warmup_steps": 50}, 50, EAGERNESS * 75.5 / 50),
        ({"schedule": "linear", "betas": [0.0, 0.99]}, 20, EAGERNESS * 5050 / 3240),
        ({"schedule": "constant", "betas": [0.5, 0.99]}, 30, EAGERNESS * 100 / (69 + 2**-70)),
        ({"schedule": "linear"}, 90, HIGHEST_GAIN),
        ({"schedule": "linear"}, 100, 1.0),
    ],
)
def test_what_new_ranks_missed_goes_by_the_learning_rates(changes: dict[str, Any], step: int, gain: float) -> None:
    train = TrainSection(**{"max_steps": 100, "warmup_steps": 0, **changes})
    assert catch_up(train, step, 100) == pytest.approx(gain, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "bnb"])
def test_what_was_learned_keeps_its_states(dtype: torch.dtype, kind: str) -> None:
    """A step of the grown weight moves the old part as the ungrown weight's would."""
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 7), torch.randn(3, 3, 7)
    make = optimizer_maker("adamw", (0.9, 0.99), 1e-8, 0.01, torch.device("cpu"))[0] if kind == "adamw" else bnb_32bit
    small, large = (AdapterOptimizer({"a": nn.Parameter(start.to(dtype, copy=True))}, make) for _ in range(2))
    for step, gradient in enumerate(gradients):
        if step == 2:
            grown = torch.cat([large.parameters["a"].detach(), torch.ones(2, 7, dtype=dtype)])
            large.replace({"a": nn.Parameter(grown)})
        for optimizer in (small, large):
            parameter = optimizer.parameters["a"]
            parameter.grad = torch.cat([gradient, torch.ones(len(parameter) - 3, 7)]).to(dtype)
            optimizer.set_lr(0.1)
            optimizer.step()
    assert torch.equal(large.parameters["a"][:3], small.parameters["a"])
    assert (large.parameters["a"][3:] < 1).all()
    tensors, numbers = large.state()
    again = AdapterOptimizer({"a": nn.Parameter(large.parameters["a"].detach().clone())}, make)
    again.load_state(tensors, numbers)
    assert again.state()[0].keys() == tensors.keys()


def test_new_weights_move_as_far_as_old_ones_of_their_output() -> None:
    """The step count goes on: were their second moments to start at zero, they would move up to four times as far. Were
    they to start at one mean of all, those of outputs with small gradients would hardly move."""
    torch.manual_seed(0)
    make = optimizer_maker("adamw", (0.9, 0.999), 1e-8, 0.0, torch.device("cpu"))[0]
    optimizer = AdapterOptimizer({"b": nn.Parameter(torch.zeros(50, 4))}, make)
    optimizer.set_lr(1e-3)
    for step in range(330):
        if step == 300:
            optimizer.replace(
                {"b": nn.Parameter(torch.cat([optimizer.parameters["b"].detach(), torch.zeros(50, 12)], 1))}
            )
        weight = optimizer.parameters["b"]
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape) * torch.logspace(-3, 0, 50)[:, None]
        optimizer.step()
        moved = (weight.detach() - before).abs() / 1e-3
        if step >= 300:
            assert moved[:, 4:].mean() < 1.3 * moved[:, :4].mean()
            assert moved[:10, 4:].mean() > 0.1 * moved[:10, :4].mean()
    assert moved[:10, 4:].mean() > 0.7 * moved[:10, :4].mean()


def test_a_growth_after_the_last_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), adapter={"growth": [{"at": 0.99, "rank": 8}]})
    assert main(["train", str(recipe), "--quiet", "train.max_steps=6", "train.warmup_steps=0"]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "adapter.growth: rank 8 comes after the last of 6 steps (got 'at: 0.99'). Allowed: at most 0.833333" in said


def bnb_32bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)


def test_eight_bit_states_are_carried_within_their_rounding() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(90, 60))
    optimizer = AdapterOptimizer({"b": parameter}, lambda of: bitsandbytes.optim.AdamW8bit(of, lr=0.0))
    parameter.grad = torch.randn(90, 60)
    optimizer.set_lr(0.01)
    optimizer.step()
    before = expanded(optimizer)
    assert optimizer.state()[0]["b/state1"].dtype == torch.uint8
    optimizer.replace({"b": nn.Parameter(torch.cat([parameter.detach(), torch.zeros(90, 9)], 1))})
    after = expanded(optimizer)
    for old, new in zip(before, after, strict=True):
        assert new.shape == (90, 69)
        assert (new[:, :60] - old).abs().max() < 0.03 * old.abs().max()
    assert after[0][:, 60:].abs().max() < 1e-4 * before[0].abs().max()
    torch.testing.assert_close(after[1][:, 60:], before[1].mean(1, keepdim=True).expand(90, 9), rtol=0.15, atol=0)
    optimizer.parameters["b"].grad = torch.randn(90, 69)
    optimizer.step()
    assert torch.isfinite(optimizer.parameters["b"]).all()


def expanded(optimizer: AdapterOptimizer) -> list[torch.Tensor]:
    import bitsandbytes

    tensors, _ = optimizer.state()
    return [
        bitsandbytes.functional.dequantize_blockwise(
            tensors[f"b/state{i}"], absmax=tensors[f"b/absmax{i}"], code=tensors[f"b/qmap{i}"], blocksize=256
        )
        for i in (1, 2)
    ]


@pytest.fixture(scope="module")
def grown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 steps: rank 4 to step 2, 5 to step 5, then 12; a checkpoint each step."""
    folder = tmp_path_factory.mktemp("growth")
    changes = {"max_steps": 10, "save_every": 1, "keep_checkpoints": 10, "eval_every": 5}
    return train(write_recipe(folder, save_tiny_model(folder / "model"), adapter=ADAPTER, train=changes))


def stored_rank(folder: Path) -> tuple[int, float]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["r"], config["lora_alpha"]


def test_checkpoints_have_the_rank_of_their_step(grown_run: Path) -> None:
    found = [stored_rank(grown_run / f"checkpoints/step-{step:06d}/adapter") for step in range(1, 11)]
    assert found == [(4, 8)] * 2 + [(5, 10)] * 3 + [(12, 24)] * 5
    losses = [record["loss"] for record in RunFolder.open(grown_run).metrics() if record["kind"] == "train"]
    assert losses[-1] < losses[5] < losses[0]


@pytest.mark.parametrize("step", [1, 2, 3, 6, 8])
def test_a_kill_around_a_growth_changes_no_bit(tmp_path: Path, grown_run: Path, step: int) -> None:
    killed = killed_after(grown_run, step, tmp_path / "killed")
    assert main(["train", "--resume", str(killed), "--quiet"]) == 0
    for name in ("adapter", "checkpoints/step-000010/adapter", "checkpoints/step-000010"):
        for file in (grown_run / name).glob("*.safetensors"):
            assert (killed / name / file.name).read_bytes() == file.read_bytes()


def test_peft_reads_what_has_grown(grown_run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(grown_run.parents[1] / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(grown_run / "adapter"))
    assert torch.isfinite(logits(theirs)).all()
    run = RunFolder.open(grown_run)
    assert {layer.rank for _, layer in adapted_layers(load_tuned(run))} == {12}
    manifest = run.manifest()
    weights = sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    assert manifest["results"]["trainable_params"] == weights


def test_a_best_step_before_the_growth_is_published(tmp_path: Path) -> None:
    """A rate that destroys what was learned: the first evaluation stays the best."""
    changes = {"max_steps": 6, "eval_every": 1, "lr": 1.0, "keep_checkpoints": 6}
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), adapter=ADAPTER, train=changes)
    run = RunFolder.open(train(recipe))
    best = run.manifest()["results"]["best_step"]
    assert best == run.manifest()["adapter"]["step"]
    assert stored_rank(run.adapter)[0] == {1: 4, 2: 5, 3: 5}.get(best, 12)
    assert math.isfinite(run.manifest()["results"]["final_eval_loss"])


def test_growth_needs_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), adapter=ADAPTER)
    assert main(["train", str(recipe), "--quiet"]) == 2
    assert "adapter.growth needs one process (got 2). Allowed: 1 process" in capsys.readouterr().err
