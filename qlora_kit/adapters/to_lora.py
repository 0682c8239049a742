"""A PiSSA, LoftQ or QA-LoRA adapter as an ordinary LoRA adapter, for the base that everyone has."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from qlora_kit.adapters.files import CONFIG, PREFIX, write_adapter
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import StoredAdapter, read_adapter
from qlora_kit.adapters.qa_lora import QaLora, widened_tensors
from qlora_kit.adapters.svd_init import SvdStart, read_subtracted
from qlora_kit.errors import AdapterError

CONVERTIBLE = (SvdStart, QaLora)


def convert_to_lora(folder: Path, target: Path) -> None:
    """Writes the PiSSA or LoftQ adapter in `folder` as a LoRA adapter of twice its rank into `target`; one of QA-LoRA
    keeps its rank, and is exact.

    W - s B₀ A₀ + s B A is W + s [B, -B₀] [A; A₀] (Meng et al. 2024, appendix C; PEFT converts so too). On an
    unquantized base that is exact up to rounding. On a quantized one it is exact only up to the difference of two
    quantizations, that of W - s B₀ A₀, on which the adapter was trained, and that of W, on which it will stand. A
    LoftQ adapter that subtracted nothing (iterations: 1) keeps its rank, and is exact.

    Raises:
        AdapterError: `folder` holds no such adapter, or `target` holds one already.
    """
    stored = read_adapter(folder)
    if not issubclass(stored.method, CONVERTIBLE):
        raise AdapterError(
            f"{folder} holds no PiSSA, LoftQ or QA-LoRA adapter", got=stored.method.__name__, fix="Use it as it is"
        )
    if (target / CONFIG).exists():
        raise AdapterError(f"{target} holds an adapter already", fix="Give another folder")
    converted = to_lora(stored, folder)
    target.mkdir(parents=True, exist_ok=True)
    write_adapter(target, converted.config, converted.tensors)


def to_lora(stored: StoredAdapter, folder: Path) -> StoredAdapter:
    """What was read from `folder` as ordinary LoRA: with A widened, or of PiSSA and LoftQ with product s (B A - B₀ A₀).

    Raises:
        AdapterError: what their base lacks is not in the folder.
    """
    config = stored.config | {"init_lora_weights": True}
    if issubclass(stored.method, QaLora):
        plain = {key: value for key, value in config.items() if key not in ("group_size", "in_features")}
        tensors = widened_tensors(stored.config, stored.tensors, PREFIX)
        return StoredAdapter(Lora, plain | {"peft_type": Lora.peft_type}, tensors)
    subtracted = read_subtracted(folder)  # of no layer or of some
    if not subtracted:
        return StoredAdapter(Lora, config, stored.tensors)
    tensors = dict(stored.tensors)
    for name in stored.layers():
        key_a, key_b = (f"{PREFIX}{name}.{own}.weight" for own in ("lora_A", "lora_B"))
        a, b = tensors[key_a], tensors[key_b]
        a_0 = subtracted.get(f"{name}.lora_A", torch.zeros_like(a))
        b_0 = subtracted.get(f"{name}.lora_B", torch.zeros_like(b))
        tensors[key_a], tensors[key_b] = torch.cat([a, a_0]), torch.cat([b, -b_0], dim=1)
    # Twice the rank with the scaling that was.
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    config |= {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }
    return replace(stored, method=Lora, config=config, tensors=tensors)
