"""What tests of adapter methods share: trained weights drawn at random, and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from tiny_models import tiny_ids, tiny_model

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.peft_format import load_adapter, read_adapter
from qlora_kit.export.merge import merge_adapter


def randomize(model: torch.nn.Module) -> None:
    """Values that show in the logits, for everything trained."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(trainable_parameters(model).items()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    """Of `tiny_ids`, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(tiny_ids()).logits


def assert_ships_as_lora(shipped: Path, expected: torch.Tensor, dtype: str = "fp32") -> None:
    """The adapter in `shipped` gives a tiny Llama these logits: in PEFT, here as LoRA, and merged; all in `dtype`."""
    assert {tensor.dtype for tensor in read_adapter(shipped).tensors.values()} == {DTYPES[dtype]}
    atol = {"fp32": 1e-5, "bf16": 0.02}[dtype]  # B was rounded once
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(shipped))
    again = tiny_model("llama")
    assert isinstance(load_adapter(again, shipped), Lora)
    for other in (theirs, again):
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=atol)
    merge_adapter(again)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=atol)


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    """Of A and B of each layer, between a model of ours and a trainable one of PEFT's with the same weights."""
    for model in (ours, theirs):
        model.zero_grad()
        model(tiny_ids(), labels=tiny_ids()).loss.backward()
    compared = 0
    for name, layer in adapted_layers(ours):
        other = theirs.base_model.model.get_submodule(name)
        for own, wrapped in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            torch.testing.assert_close(own.grad, wrapped["default"].weight.grad, rtol=1e-4, atol=1e-5)
            compared += bool(own.grad.any())
    assert compared
