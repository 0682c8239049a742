"""Padding behind the tokens: no mask is made for it, and losses and gradients are those with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_ids, tiny_model
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from qlora_kit.tasks.logits import needs_no_mask, reads_only_back
from qlora_kit.tasks.loss import token_losses

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox", "phi", "gemma2", "opt"]


def padded_batch() -> dict[str, Tensor]:
    ids = tiny_ids(0, 3, 13)
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_are_those_with_a_mask(arch: str) -> None:
    model: Any = tiny_model(arch).eval()
    batch = padded_batch()
    assert needs_no_mask(model, batch["attention_mask"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    masked = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")
    found = token_losses(model, batch)[0].sum()
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)
    with_mask = gradients(model, masked)
    for name, grad in gradients(model, token_losses(model, batch)[0].sum()).items():
        scale = max(1e-3, with_mask[name].abs().max().item())
        torch.testing.assert_close(grad, with_mask[name], rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_in_front_keeps_its_mask(arch: str) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    assert not needs_no_mask(tiny_model(arch), mask)


def test_a_model_that_reads_ahead_keeps_its_mask() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    for decoder in (False, True):
        model = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, is_decoder=decoder))
        assert reads_only_back(model) is decoder and model.training


def test_what_is_no_model_of_transformers_keeps_its_mask() -> None:
    assert not needs_no_mask(torch.nn.Linear(2, 2), torch.ones(1, 4))
