"""SoRA: the proximal step against a by-hand one, and how closed ranks leave the adapter that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import assert_ships_as_lora, logits, randomize
from tiny_models import save_tiny_model, tiny_ids, tiny_model

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import SoraSettings
from qlora_kit.adapters.sora import Sora, SoraLinear, soft_threshold
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

SETTINGS = SoraSettings(rank=4, alpha=7.0, dtype="fp32", rank_pattern={"q_proj": 3}, use_rslora=True)


def adapted(settings: SoraSettings = SETTINGS) -> tuple[Any, Sora]:
    torch.manual_seed(0)
    model, method = tiny_model("llama"), Sora(settings)
    method.inject(model)
    return model, method


def own_layers(model: torch.nn.Module) -> dict[str, SoraLinear]:
    return {name: layer for name, layer in adapted_layers(model) if isinstance(layer, SoraLinear)}


def test_the_threshold() -> None:
    values = torch.tensor([1.0, -1.0, 0.3, -0.3, 0.25, 0.1, 0.0])
    wanted = torch.tensor([0.75, -0.75, 0.05, -0.05, 0.0, 0.0, 0.0])
    torch.testing.assert_close(soft_threshold(values, 0.25), wanted)
    assert torch.equal(soft_threshold(values, 0.0), values)


def test_a_step_is_the_gradient_step_and_the_threshold() -> None:
    """Equations 5 to 8 by hand, with plain gradient descent as the paper writes them."""
    model, method = adapted(SETTINGS.model_copy(update={"sparse_lambda": 2.0}))
    randomize(model)
    lr, layers = 0.1, own_layers(model)
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    stepped = {name: layer.lora_gate.detach() - lr * layer.lora_gate.grad for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_gate.data -= lr * layer.lora_gate.grad
    method.after_step(model, 1, 10, lr)
    for name, layer in layers.items():
        for found, before in zip(layer.lora_gate.tolist(), stepped[name].tolist(), strict=True):
            wanted = before - 0.2 if before > 0.2 else before + 0.2 if before < -0.2 else 0.0
            assert found == pytest.approx(wanted, abs=1e-6)


def test_training_starts_at_the_base_and_gates_stay_exact() -> None:
    model, _ = adapted(SETTINGS.model_copy(update={"dtype": "bf16"}))
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    for name, layer in own_layers(model).items():
        assert layer.lora_gate.dtype == torch.float32 and layer.lora_A.dtype == torch.bfloat16
        assert len(layer.lora_gate) == (3 if "q_proj" in name else 4)


def close(model: torch.nn.Module) -> None:
    for name, layer in own_layers(model).items():
        layer.lora_gate.data[{"k_proj": slice(None), "up_proj": slice(0)}.get(name.split(".")[-1], slice(1, 3))] = 0.0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_ships_computes_the_same_with_fewer_ranks(tmp_path: Path, dtype: str) -> None:
    ours, method = adapted(SETTINGS.model_copy(update={"dtype": dtype}))
    randomize(ours)
    close(ours)
    checkpoint, shipped = tmp_path / "checkpoint", tmp_path / "shipped"
    save_adapter(ours, method, checkpoint, "tiny")
    stored = tiny_model("llama")
    loaded = load_adapter(stored, checkpoint)
    assert isinstance(loaded, Sora) and loaded.settings.sparse_lambda == SETTINGS.sparse_lambda
    assert torch.equal(logits(stored), logits(ours))

    shipped.mkdir()
    method.publish(checkpoint, shipped)
    config = json.loads((shipped / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 2
    assert sorted(config["rank_pattern"].values()) == [1, 1, 4, 4]  # q_proj and up_proj of two blocks
    assert not any("k_proj" in name for name in config["target_modules"])
    assert_ships_as_lora(shipped, logits(ours), dtype)


def test_an_adapter_whose_gates_are_all_closed_is_not_shipped(tmp_path: Path) -> None:
    model, method = adapted()
    for layer in own_layers(model).values():
        layer.lora_gate.data.zero_()
    save_adapter(model, method, tmp_path / "checkpoint", "tiny")
    with pytest.raises(AdapterError, match=r"every rank of every layer was pruned.*Lower adapter\.sparse_lambda"):
        method.publish(tmp_path / "checkpoint", tmp_path)


def test_training_ends_where_the_last_gate_closes() -> None:
    model, method = adapted(SETTINGS.model_copy(update={"sparse_lambda": 1.0}))
    last = max(layer.lora_gate.abs().max().item() for layer in own_layers(model).values())
    steps = int(last / 0.25)
    for step in range(1, steps + 1):
        method.after_step(model, step, 99, 0.25)
    assert any(layer.lora_gate.any() for layer in own_layers(model).values())
    words = rf"pruned every rank of every layer by step {steps + 1} of 99.*\(got 1\.0\)\. Lower it"
    with pytest.raises(AdapterError, match=words):
        method.after_step(model, steps + 1, 99, 0.25)


def test_a_missing_weight_of_the_penalty_is_named(tmp_path: Path) -> None:
    model, method = adapted()
    save_adapter(model, method, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    tree = json.loads(path.read_text())
    del tree["sparse_lambda"]
    path.write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match="sparse_lambda: input should be a valid number"):
        load_adapter(tiny_model("llama"), tmp_path)


def trained(sparse_lambda: float) -> tuple[Any, Sora]:
    model, method = adapted(SETTINGS.model_copy(update={"sparse_lambda": sparse_lambda}))
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=0.02)
    for step in range(1, 26):
        model(tiny_ids(), labels=tiny_ids()).loss.backward()
        optimizer.step()
        method.after_step(model, step, 25, 0.02)
        optimizer.zero_grad()
    return model, method


def test_a_larger_lambda_ends_with_fewer_ranks_and_a_smaller_file(tmp_path: Path) -> None:
    ranks, sizes = [], []
    for weight in (0.0, 0.5, 2.0):
        model, method = trained(weight)
        folder = tmp_path / str(weight)
        save_adapter(model, method, folder / "checkpoint", "tiny")
        (folder / "shipped").mkdir()
        method.publish(folder / "checkpoint", folder / "shipped")
        ranks.append(sum(int((layer.lora_gate != 0).sum()) for layer in own_layers(model).values()))
        sizes.append((folder / "shipped" / "adapter_model.safetensors").stat().st_size)
        again = tiny_model("llama")
        load_adapter(again, folder / "shipped")
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert ranks[0] == 2 * (3 + 6 * 4) and ranks[0] > ranks[1] > ranks[2] > 0
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.7 * sizes[0]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_on_a_quantized_base_merged_alike(tmp_path: Path, quant: str) -> None:
    save_tiny_model(tmp_path / "base")
    ours = load_base(find_base(str(tmp_path / "base")), quant, compute_dtype=torch.float32)
    Sora(SETTINGS).inject(ours)
    randomize(ours)
    before = logits(ours)
    merge_adapter(ours)
    assert not list(adapted_layers(ours))
    torch.testing.assert_close(logits(ours), before, rtol=0, atol=1e-5)
