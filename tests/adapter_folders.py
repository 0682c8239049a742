"""Random adapters on disk, for the tests of what is done with several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_ids, tiny_model

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.peft_format import save_adapter
from qlora_kit.adapters.settings import SETTINGS


def adapter(
    folder: Path, seed: int, arch: str = "llama", method: str = "lora", base: str = "tiny", **fields: Any
) -> Path:
    """Writes an adapter of random values for the tiny model `arch`. Returns `folder`."""
    settings = SETTINGS[method](**({"dtype": "fp32"} | fields))
    model = tiny_model(arch)
    made = method_for(settings)
    made.inject(model)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(trainable_parameters(model).items()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, made, folder, base)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_ids()).logits
