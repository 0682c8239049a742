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

from qlora_kit.adapters.inject import (
    expand_modules_to_save,
    is_tied_head,
    trainable_parameters,
    untie_head,
)
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.methods import stored_method
from qlora_kit.errors import AdapterError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: PEFT's configuration, and tensors by PEFT's names."""

    method: type[Method[Any]]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def layers(self) -> list[str]:
        """Full names of the layers that hold tensors of the method's own."""
        found = {}
        for key in self.tensors:
            for stored in self.method.stored_as.values():
                if key.endswith(f".{stored}"):
                    found[key.removeprefix(PREFIX).removesuffix(f".{stored}")] = True
        return list(found)


def adapter_tensors(model: PreTrainedModel, method: Method[Any]) -> dict[str, Tensor]:
    """All trained tensors of `model` by PEFT's names, on the CPU, contiguous."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensors[PREFIX + method.stored_name(name)] = parameter
    for name in expand_modules_to_save(model, method.settings.modules_to_save):  # a tied weight under both its names
        for child, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name}.{child}"] = parameter
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}


def save_adapter(model: PreTrainedModel, method: Method[Any], folder: Path, base_model: str) -> None:
    """Writes the adapter of `model` into `folder`, which PEFT's `PeftModel.from_pretrained` can load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **method.config(model),
        "modules_to_save": expand_modules_to_save(model, method.settings.modules_to_save) or None,
    }
    write_adapter(folder, config, adapter_tensors(model, method))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes the two files of an adapter into `folder`, which is there."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
    method = stored_method(config, folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {error}", fix="Copy or save the adapter again") from None
    return StoredAdapter(method, config, tensors)


def load_adapter(model: PreTrainedModel, folder: Path) -> Method[Any]:
    """Injects the adapter in `folder` into `model` and fills it, in place.

    Raises:
        AdapterError: damaged files, or tensors that do not fit this model (each named).
    """
    stored = read_adapter(folder)
    targets = stored.layers()
    settings = stored.method.read_config(stored.config, stored.tensors, folder / CONFIG)
    settings = settings.model_copy(update={"modules_to_save": _saved_modules(stored)})
    modules = dict(model.named_modules())
    unknown = [name for name in targets + settings.modules_to_save if name not in modules]
    if unknown or (stored.method.stored_as and not targets):
        what = f"this one has no layer {unknown[0]}" if unknown else f"it holds no {stored.method.__name__} tensor"
        raise AdapterError(
            f"{folder}: the adapter was made for another model; {what}",
            fix="Load it on the base model it was trained on",
        )
    _match_embeddings(model, stored, folder)
    method = stored.method(settings)
    method.inject(model, targets)
    fill_adapter(model, method, stored.tensors, str(folder))
    return method


def fill_adapter(model: PreTrainedModel, method: Method[Any], tensors: dict[str, Tensor], origin: str) -> None:
    """Copies tensors by PEFT's names into an injected model; every trained tensor must be there, and no other.

    Raises:
        AdapterError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    expected = {key: tensor.shape for key, tensor in adapter_tensors(model, method).items()}
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        name, what = (missing[0], "is missing") if missing else (surplus[0], "is not part of this model's adapter")
        raise AdapterError(f"{origin}: tensor {name} {what}", fix="Load it on the base model it was trained on")
    for key, tensor in tensors.items():  # all are checked before one is copied
        if tensor.shape != expected[key]:
            raise AdapterError(f"{origin}: shape of {key}", got=list(tensor.shape), allowed=str(list(expected[key])))
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{origin}: {key} holds NaN or Inf", fix="Use an earlier checkpoint")
    own = {method.stored_name(name): name for name in trainable_parameters(model)}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        model.get_parameter(own.get(name, name)).data.copy_(tensor)


def _saved_modules(stored: StoredAdapter) -> list[str]:
    """Modules stored in full, by their tensors: PEFT stores resized embeddings too, which its config does not name,
    and matches names differently (its `norm` means `input_layernorm` as well)."""
    own = tuple(f".{name}" for name in stored.method.stored_as.values())
    names = {key.removeprefix(PREFIX).removesuffix(".weight") for key in stored.tensors if not key.endswith(own)}
    return sorted(name for name in names if f"{PREFIX}{name}.weight" in stored.tensors)


def _match_embeddings(model: PreTrainedModel, stored: StoredAdapter, folder: Path) -> None:
    """Resizes and unties the model's embedding and head to what the adapter holds.

    An adapter trained with new tokens holds larger ones than the base; PEFT trains a tied head as a copy.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = is_tied_head(model, head)
    kept = {}
    for name, module in model.named_modules():
        if module is embedding or module is head:
            kept["head" if module is head else "embedding"] = stored.tensors.get(f"{PREFIX}{name}.weight")
    sizes = {len(weight) for weight in kept.values() if weight is not None}
    if sizes - {embedding.weight.shape[0]}:
        if len(sizes) > 1 or None in kept.values():
            raise AdapterError(f"{folder}: new tokens, but not both the embedding and the head", fix="Save both")
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    one, other = kept.get("embedding"), kept.get("head")
    if tied and one is not other and (one is None or other is None or not torch.equal(one, other)):
        untie_head(model)
