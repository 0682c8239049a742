"""adapter_config.json: what PEFT says of a LoRA adapter, written and read; what is not supported is refused by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.low_rank_settings import FactorSettings, LowRankSettings
from qlora_kit.adapters.method import dtype_name
from qlora_kit.errors import AdapterError

UNSUPPORTED = {
    "lora_bias": False,
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
L = TypeVar("L", bound=LowRankSettings)


def low_rank_config(model: PreTrainedModel, settings: LowRankSettings) -> dict[str, Any]:
    """The fields of a LoRA adapter's adapter_config.json, as plain data."""
    return {
        "r": settings.rank,
        "use_rslora": settings.use_rslora,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        **factor_config(model, settings),
    }


def factor_config(model: PreTrainedModel, settings: FactorSettings) -> dict[str, Any]:
    """The fields that all methods with two factors share, as plain data."""
    layers = dict(adapted_layers(model))
    alpha = settings.alpha
    return {
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # some readers take integers only
        "lora_dropout": settings.dropout,
        "bias": settings.bias,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "target_modules": _short_names(model, list(layers)),
    }


def check_low_rank_config(config: dict[str, Any], origin: Path) -> None:
    """Refuses what makes a LoRA adapter another one than this toolkit can compute.

    Raises:
        AdapterError: names the field.
    """
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


def read_low_rank_config(
    kind: type[L], config: dict[str, Any], tensors: dict[str, Tensor], origin: Path, **more: Any
) -> L:
    """The settings of class `kind` that a checked configuration means.

    Raises:
        AdapterError: a field is missing, or not of its type.
    """
    with wrong_fields_named(origin, {"rank": "r", "alpha": "lora_alpha"}):
        return kind(
            rank=int(config["r"]),
            use_rslora=bool(config.get("use_rslora", False)),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            **factor_fields(config, tensors),
            **more,
        )


def factor_fields(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a configuration says of the fields that all methods with two factors share."""
    return {
        "alpha": float(config["lora_alpha"]),
        "dropout": float(config.get("lora_dropout", 0.0)),
        "bias": config.get("bias", "none"),
        "target_modules": config["target_modules"],
        "modules_to_save": list(config.get("modules_to_save") or []),
        "dtype": dtype_name(tensors, (".lora_A", ".lora_B")),
    }


@contextmanager
def wrong_fields_named(origin: Path, names: dict[str, str]) -> Iterator[None]:
    """Turns what reading a configuration may raise into an AdapterError; `names` maps our fields to the file's."""
    try:
        yield
    except KeyError as error:
        raise AdapterError(f"{origin}: field {error} is missing", fix="Save the adapter again") from None
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise AdapterError(f"{origin}: {first['msg'].removeprefix('Value error, ')}") from None
        name = names.get(str(first["loc"][0]), str(first["loc"][0]))
        raise AdapterError(f"{origin}: {name}: {first['msg'].lower()}", got=first["input"]) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{origin}: a field has a wrong type: {error}", fix="Save the adapter again") from None


def unscaled_config(ranks: dict[str, int], like: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter whose scaling is 1: alpha is the rank, in every layer.

    Args:
        ranks: of the adapted layers, by their full names.
        like: the configuration of an adapter on the same base, which gives the fields that are not of the ranks.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    kept = ("task_type", "base_model_name_or_path", "inference_mode", "lora_dropout", "bias", "fan_in_fan_out",
            "target_modules", "modules_to_save")  # fmt: skip
    return {
        "peft_type": "LORA",
        **{name: like[name] for name in kept},
        "r": usual,
        "lora_alpha": usual,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
    }


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
