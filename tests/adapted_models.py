"""What tests of adapter methods share: trained weights drawn at random, and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from tiny_models import tiny_ids, tiny_model

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import load_adapter
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


def assert_ships_as_lora(shipped: Path, expected: torch.Tensor) -> None:
    """The adapter in `shipped` gives a tiny Llama these logits: in PEFT, here as LoRA, and merged."""
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(shipped))
    again = tiny_model("llama")
    assert isinstance(load_adapter(again, shipped), Lora)
    for other in (theirs, again):
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)
    merge_adapter(again)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
