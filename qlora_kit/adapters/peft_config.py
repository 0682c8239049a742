"""adapter_config.json: what PEFT says of a LoRA adapter, written and read; what is not supported is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import expand_modules_to_save, lora_layers
from qlora_kit.adapters.lora import LoraSettings
from qlora_kit.errors import AdapterError

UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""PEFT's fields that change what an adapter computes, and the value that means they are not used."""
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base weights too: such an adapter is nothing without its own base."""
BIASES = ("none", "lora_only", "all")


def config_tree(model: PreTrainedModel, settings: LoraSettings, base_model: str) -> dict[str, Any]:
    """adapter_config.json of the adapter in `model`, as plain data."""
    layers = dict(lora_layers(model))
    alpha = settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # some readers take integers only
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "bias": settings.bias,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "target_modules": _short_names(model, list(layers)),
        "modules_to_save": expand_modules_to_save(model, settings.modules_to_save) or None,
    }


def check_config(config: Any, origin: Path) -> None:
    """Refuses what is not a LoRA adapter that this toolkit can compute.

    Raises:
        AdapterError: names the field.
    """
    if not isinstance(config, dict):
        raise AdapterError(f"{origin} is not a JSON object", fix="Save the adapter again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{origin}: peft_type", got=kind, allowed="LORA")
    for name, plain in UNSUPPORTED.items():
        if config.get(name, plain) not in (plain, None):
            raise AdapterError(f"{origin}: {name} is not supported", got=config[name], allowed=f"{plain!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASED):
        raise AdapterError(
            f"{origin}: init_lora_weights changes the base's weights, which is not supported",
            got=start,
            fix="Save it with PEFT's path_initial_model_for_weight_conversion",
        )
    if config.get("bias", "none") not in BIASES:
        raise AdapterError(f"{origin}: bias", got=config["bias"], allowed=", ".join(BIASES))


def settings_of(config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> LoraSettings:
    """The settings that a checked configuration means.

    Raises:
        AdapterError: a field is missing, or not of its type.
    """
    dtypes = {tensor.dtype for key, tensor in tensors.items() if ".lora_" in key}
    try:
        settings = LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora", False)),
            dropout=float(config.get("lora_dropout", 0.0)),
            bias=config.get("bias", "none"),
            target_modules=config["target_modules"],
            modules_to_save=list(config.get("modules_to_save") or []),
            dtype=torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32,
        )
    except KeyError as error:
        raise AdapterError(f"{origin}: field {error} is missing", fix="Save the adapter again") from None
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{origin}: a field has a wrong type: {error}", fix="Save the adapter again") from None
    if settings.rank < 1:
        raise AdapterError(f"{origin}: r", got=settings.rank, allowed="1 or more")
    return settings


def _short_names(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Name endings where they mean exactly these layers (what other tools expect), else full names.

    PEFT takes any module whose name ends so, of whatever kind, but for those in modules_to_save.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
    wrapped = set(targets)
    for name, _ in model.named_modules():
        if name.rsplit(".", 1)[-1] in endings and name not in wrapped:
            return targets
    return endings
