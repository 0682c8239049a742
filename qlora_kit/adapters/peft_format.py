"""Adapters on disk, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

Tensor names are PEFT's: `base_model.model.NAME.lora_A.weight` [rank, in], `….lora_B.weight` [out, rank],
`base_model.model.NAME.weight` for modules trained in full, `….base_layer.bias` for trained biases of targets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import (
    expand_modules_to_save,
    find_targets,
    inject_lora,
    lora_layers,
    trainable_parameters,
)
from qlora_kit.adapters.lora import LoraSettings
from qlora_kit.errors import AdapterError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: PEFT's configuration, and tensors by PEFT's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def adapter_tensors(model: PreTrainedModel, settings: LoraSettings) -> dict[str, Tensor]:
    """All trained tensors of `model` by PEFT's names, on the CPU, contiguous."""
    tensors: dict[str, Tensor] = {}
    for name in trainable_parameters(model):
        key = f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name
        tensors[PREFIX + key] = model.get_parameter(name)
    for name in expand_modules_to_save(model, settings.modules_to_save):  # a tied weight under both its names
        for child, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name}.{child}"] = parameter
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}


def save_adapter(model: PreTrainedModel, settings: LoraSettings, folder: Path, base_model: str) -> None:
    """Writes the adapter of `model` into `folder`, which PEFT's `PeftModel.from_pretrained` can load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model, settings), folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "bias": settings.bias,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for _, layer in lora_layers(model)),
        "target_modules": _short_names(model, [name for name, _ in lora_layers(model)]),
        "modules_to_save": expand_modules_to_save(model, settings.modules_to_save) or None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> StoredAdapter:
    """Reads an adapter, ours or PEFT's.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter uses what this toolkit does not have.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} is no adapter: {name} is missing", fix="Give the folder that PEFT or train wrote"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON: {error}", fix="Save the adapter again") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type", got=kind, allowed="LORA")
    for name, plain in UNSUPPORTED.items():
        if config.get(name, plain) not in (plain, None):
            raise AdapterError(f"{folder / CONFIG}: {name} is not supported", got=config[name], allowed=f"{plain!r}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {error}", fix="Copy or save the adapter again") from None
    return StoredAdapter(config, tensors)


def load_adapter(model: PreTrainedModel, folder: Path) -> LoraSettings:
    """Injects the adapter in `folder` into `model` and fills it, in place.

    Raises:
        AdapterError: damaged files, or tensors that do not fit this model (each named).
    """
    stored = read_adapter(folder)
    targets = [_layer_name(key) for key in stored.tensors if key.endswith(".lora_A.weight")]
    settings = _settings(stored, folder)
    modules = dict(model.named_modules())
    unknown = [name for name in targets if name not in modules]
    if unknown or not targets:
        raise AdapterError(
            f"{folder}: the adapter was made for another model; it has no layer {unknown[0] if unknown else ''}".rstrip(),
            fix="Load it on the base model it was trained on",
        )
    _resize_embeddings(model, stored)
    inject_lora(model, settings, targets)
    fill_adapter(model, settings, stored.tensors, str(folder))
    return settings


def fill_adapter(model: PreTrainedModel, settings: LoraSettings, tensors: dict[str, Tensor], origin: str) -> None:
    """Copies tensors by PEFT's names into an injected model; every trained tensor must be there, and no other.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    expected = {key: tensor.shape for key, tensor in adapter_tensors(model, settings).items()}
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        name, what = (missing[0], "is missing") if missing else (surplus[0], "is not part of this model's adapter")
        raise AdapterError(f"{origin}: tensor {name} {what}", fix="Load it on the base model it was trained on")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key]:
            raise AdapterError(f"{origin}: shape of {key}", got=list(tensor.shape), allowed=str(list(expected[key])))
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{origin}: {key} holds NaN or Inf", fix="Use an earlier checkpoint")
        name = key.removeprefix(PREFIX)
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            name = name.removesuffix(".weight")
        model.get_parameter(name).data.copy_(tensor)


def _settings(stored: StoredAdapter, folder: Path) -> LoraSettings:
    config = stored.config
    dtypes = {tensor.dtype for key, tensor in stored.tensors.items() if ".lora_" in key}
    try:
        return LoraSettings(
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
        raise AdapterError(f"{folder / CONFIG}: field {error} is missing", fix="Save the adapter again") from None


def _layer_name(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".lora_A.weight")


def _resize_embeddings(model: PreTrainedModel, stored: StoredAdapter) -> None:
    """An adapter trained with new tokens holds larger embeddings than the base."""
    embedding = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    weight = next(
        (stored.tensors[f"{PREFIX}{n}.weight"] for n in names if f"{PREFIX}{n}.weight" in stored.tensors), None
    )
    if weight is not None and weight.shape[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(weight.shape[0], mean_resizing=False)


def _short_names(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Name endings where they mean exactly these layers (what other tools expect), else full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
    wrapped = {name for name, _ in lora_layers(model)}
    others = [name for name in find_targets_anywhere(model) if name not in wrapped]
    if any(name.rsplit(".", 1)[-1] in endings for name in others):
        return targets
    return endings


def find_targets_anywhere(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers that are not inside a wrapped one."""
    return [name for name in find_targets(model, r".*") if not name.endswith(".base_layer")]
