"""The loss does not depend on how a batch is cut, nor on where logits are made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, tiny_ids, tiny_model
from tiny_runs import tiny_recipe
from torch import nn

from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.data.collate import collate
from qlora_kit.data.masking import Encoded
from qlora_kit.kernels.linear_cross_entropy import linear_cross_entropy
from qlora_kit.kernels.offloaded_inputs import offload_inputs
from qlora_kit.tasks.head import takes_losses_at_head
from qlora_kit.tasks.logits import needs_no_mask
from qlora_kit.tasks.loss import count_loss_tokens, row_losses, token_losses
from qlora_kit.train.loop import _count_tokens, _forward_backward
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import Session, start_session


def batch_of(lengths: list[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded rows of (prompt, completion) lengths, loss on the completion."""
    rows = []
    for k, (prompt, completion) in enumerate(lengths):
        ids = tiny_ids(seed + k, 1, prompt + completion)[0].numpy().astype(np.int32)
        labels = ids.copy()
        labels[:prompt] = -100
        rows.append(Encoded(ids, labels, 0, k, False))
    return collate(rows, pad_id=2)


def full_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of every token by the plain way: all logits, shifted labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_equal_those_of_full_logits_on_every_architecture(arch: str) -> None:
    model, batch = tiny_model(arch), batch_of([(5, 3), (20, 9), (1, 1), (2, 30)])
    losses, labels = token_losses(model, batch)
    plain = full_losses(model, batch)
    torch.testing.assert_close(losses.sum(1), plain.sum(1), rtol=1e-6, atol=1e-5)
    assert int((labels != -100).sum()) == count_loss_tokens(batch["labels"]) == 3 + 9 + 1 + 30


def test_logits_are_made_only_for_tokens_that_carry_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("llama"), batch_of([(12, 2), (13, 1)])
    shapes = []

    def watched(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(hidden.shape)
        return linear_cross_entropy(hidden, *rest)

    monkeypatch.setattr("qlora_kit.tasks.head.linear_cross_entropy", watched)
    losses, _ = token_losses(model.requires_grad_(False), batch)
    assert shapes == [(3, 64)]
    assert losses.shape == (2, 2) and int((losses != 0).sum()) == 3


def test_soft_capped_logits_stay_capped() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=0.5)
    batch = batch_of([(4, 6), (3, 3)])
    uncapped = tiny_model("gemma2", final_logit_softcapping=None)
    losses = token_losses(model, batch)[0]
    torch.testing.assert_close(losses.sum(1), full_losses(model, batch).sum(1))
    assert (losses.sum(1) - token_losses(uncapped, batch)[0].sum(1)).abs().max() > 0.1


ADAPTERS: dict[str, dict[str, Any]] = {
    "frozen head": {},
    "head trained in full": {"modules_to_save": ["lm_head"]},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "phi", "gemma2"])
@pytest.mark.parametrize("changes", [*ADAPTERS.values(), None], ids=[*ADAPTERS, "everything trained"])
def test_gradients_equal_those_of_full_logits(arch: str, changes: dict[str, Any] | None) -> None:
    """Weights tied or not; gemma2 bends its logits and keeps the plain path."""
    batch, found = batch_of([(5, 3), (20, 9), (2, 30)]), []
    for chunked in (False, True):
        model = tiny_model(arch).requires_grad_(changes is None)
        if changes is not None:
            names = {"gpt_neox": {"q_proj": "query_key_value"}}.get(arch, {})
            renamed = {key: [names.get(name, name) for name in value] for key, value in changes.items()}
            torch.manual_seed(0)
            method_for(LoraSettings.model_validate({"rank": 3, "dtype": "fp32", **renamed})).inject(model)
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        losses = token_losses(model, batch)[0] if chunked else full_losses(model, batch)
        (losses.sum() / 42).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        scale = max(1e-3, plain.abs().max().item())
        torch.testing.assert_close(found[1][name], plain, rtol=0, atol=1e-5 * scale, msg=name)


class OldModel(nn.Module):
    """A causal model whose forward knows no logits_to_keep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits
        return SimpleNamespace(logits=logits)


def test_models_without_logits_to_keep_give_the_same_losses() -> None:
    model, batch = OldModel(), batch_of([(5, 3), (2, 9)])
    torch.testing.assert_close(token_losses(model, batch)[0], token_losses(model.inner, batch)[0])


def test_padding_and_neighbours_do_not_move_a_rows_loss() -> None:
    model, lengths = tiny_model("llama"), [(5, 3), (30, 12), (2, 1)]
    together, tokens = row_losses(model, batch_of(lengths))
    for k, length in enumerate(lengths):
        alone, _ = row_losses(model, batch_of([length], seed=k))
        torch.testing.assert_close(alone[0], together[k], rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [3, 12, 1]


def session_for(folder: Path, model: Path, **changes: Any) -> Session:
    changes["adapter"] = {"dropout": 0.0, "dtype": "fp32"} | changes.get("adapter", {})
    recipe = tiny_recipe(folder, model, **changes)
    session = start_session(recipe, RunFolder(folder / "unused"))
    for parameter in session.optimizer.parameters.values():  # B starts at 0, which would hide A's gradient
        torch.manual_seed(parameter.numel())
        parameter.data.copy_(torch.randn_like(parameter) * 0.1)
    return session


def gradients(session: Session) -> tuple[float, dict[str, torch.Tensor]]:
    train = session.recipe.train
    rows = [session.batches.next_micro_batch() for _ in range(train.grad_accum_steps)]
    batches = [session.collate(group) for group in rows]
    loss = _forward_backward(session, 1, rows, batches, _count_tokens(session, batches)[1])
    return loss, {name: p.grad for name, p in session.optimizer.parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("micro", "accum"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_gradients_equal_those_of_the_large_batch(
    tmp_path: Path, tiny_llama: Path, micro: int, accum: int
) -> None:
    seed = {"seed": 3}
    large = session_for(tmp_path, tiny_llama, run=seed, train={"micro_batch_size": 8, "grad_accum_steps": 1})
    start = large.batches.state_dict()
    counts = [row.loss_tokens for row in large.batches.next_micro_batch()]
    assert max(counts) >= 4 * min(counts), "the rows would not tell a mean of means from a mean"
    large.batches.load_state_dict(start)
    cut = session_for(tmp_path, tiny_llama, run=seed, train={"micro_batch_size": micro, "grad_accum_steps": accum})
    loss, expected = gradients(large)
    cut_loss, found = gradients(cut)
    assert cut_loss == pytest.approx(loss, abs=1e-6)
    assert found.keys() == expected.keys() and len(found) == len(large.optimizer.parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative to the norm of the expected."""
    square = sum((found[name].float() - value.float()).square().sum().item() for name, value in expected.items())
    return (square / sum(value.float().square().sum().item() for value in expected.values())) ** 0.5


def test_gradients_of_a_bf16_adapter_add_up_in_fp32(tmp_path: Path, tiny_llama: Path) -> None:
    bf16: Any = {"run": {"seed": 3}, "adapter": {"dtype": "bf16"}}
    whole = session_for(tmp_path, tiny_llama, **bf16, train={"micro_batch_size": 8, "grad_accum_steps": 1})
    cuts = [
        session_for(tmp_path, tiny_llama, **bf16, train={"micro_batch_size": 8 // n, "grad_accum_steps": n})
        for n in (4, 8, 8)
    ]
    for parameter in cuts[-1].optimizer.parameters.values():
        parameter.grad_dtype = torch.bfloat16  # as torch would by itself
    expected = gradients(whole)[1]
    assert {value.dtype for value in expected.values()} == {torch.bfloat16}
    found = [gradients(cut)[1] for cut in cuts]
    assert {value.dtype for value in found[0].values()} == {torch.float32}
    in_fours, in_eights, in_bf16 = (distance(one, expected) for one in found)
    assert in_fours < 0.003 and in_eights < 0.003 < in_bf16


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, tiny_llama: Path, dropout: float, quant: str) -> None:
    found = [
        gradients(
            session_for(
                tmp_path,
                tiny_llama,
                base={"quant": quant},
                adapter={"dropout": dropout},
                train={"gradient_checkpointing": on},
            )
        )
        for on in (False, True)
    ]
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_offloading_is_noted_where_there_is_no_other_memory(tmp_path: Path, tiny_llama: Path) -> None:
    session = session_for(tmp_path, tiny_llama, train={"gradient_checkpointing": "offload"})
    plain = session_for(tmp_path, tiny_llama, train={"gradient_checkpointing": True})
    (note,) = set(session.notes) - set(plain.notes)
    assert note.startswith("train.gradient_checkpointing=offload needs CUDA; here all memory is the host's")
    assert gradients(session)[0] == gradients(plain)[0]


def test_offloaded_inputs_change_no_bit_of_a_step(tmp_path: Path, tiny_llama: Path) -> None:
    train = {"gradient_checkpointing": True, "mlp_tiles": 3}
    sessions = [session_for(tmp_path, tiny_llama, adapter={"dropout": 0.2}, train=train) for _ in range(2)]
    store = offload_inputs(sessions[1].plain, torch.device("cpu"))
    (loss, one), (other_loss, other) = (gradients(session) for session in sessions)
    assert loss == other_loss and store.host_bytes
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpointed_layers_keep_no_activations_of_their_own(tmp_path: Path, tiny_llama: Path) -> None:
    """The switch does something: the second forward pass of each layer is seen."""
    calls = {}
    for on in (False, True):
        session = session_for(tmp_path, tiny_llama, train={"gradient_checkpointing": on})
        takes_losses_at_head(session.plain)  # measured once, which runs the layers too, as this does
        needs_no_mask(session.plain, torch.ones(1, 1))
        seen: list[int] = []
        layer = session.plain.get_submodule("model.layers.0.self_attn.q_proj")
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        gradients(session)
        calls[on] = len(seen)
    assert calls[True] == 2 * calls[False]
