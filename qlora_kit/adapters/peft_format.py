"""Adapters on disk, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

Tensor names are PEFT's: `base_model.model.NAME.lora_A.weight` [rank, in], `….lora_B.weight` [out, rank],
`….lora_embedding_A` [rank, vocab], `….lora_embedding_B` [dim, rank]; convolutions have theirs with the kernel's
dimensions; `base_model.model.NAME.weight` for modules trained in full, `….base_layer.bias` for trained biases of
targets. Our own, which PEFT has not: `….lora_A.weight_ih_l0` and so on of a recurrent layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.files import CONFIG, PREFIX, read_files, write_adapter
from qlora_kit.adapters.inject import (
    expand_modules_to_save,
    input_embedding,
    is_tied_head,
    output_head,
    trainable_parameters,
    untie_head,
)
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.methods import stored_method
from qlora_kit.errors import AdapterError

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""Endings of class names, and what PEFT calls their task."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: PEFT's configuration, and tensors by PEFT's names."""

    method: type[Method[Any]]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def layers(self) -> list[str]:
        """Full names of the layers that hold tensors of the method's own."""
        layers = (self.method.layer_of(key.removeprefix(PREFIX)) for key in self.tensors)
        return list(dict.fromkeys(name for name in layers if name is not None))


def adapter_tensors(model: PreTrainedModel, method: Method[Any]) -> dict[str, Tensor]:
    """All trained tensors of `model` by PEFT's names, on the CPU, contiguous."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensors[name if name in method.stored_bare else PREFIX + method.stored_name(name)] = parameter
    for name in expand_modules_to_save(model, method.settings.modules_to_save):  # a tied weight under both its names
        for child, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name}.{child}"] = parameter
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}


def save_adapter(model: PreTrainedModel, method: Method[Any], folder: Path, base_model: str) -> None:
    """Writes the adapter of `model` into `folder`, which PEFT's `PeftModel.from_pretrained` can load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": method.peft_type,
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **method.config(model),
        "modules_to_save": expand_modules_to_save(model, method.settings.modules_to_save) or None,
    }
    write_adapter(folder, config, method.write_tensors(adapter_tensors(model, method)))
    method.write_beside(folder)


def read_adapter(folder: Path) -> StoredAdapter:
    """Reads an adapter, ours or PEFT's.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter uses what this toolkit does not have.
    """
    config, tensors = read_files(folder)
    method = stored_method(config, folder / CONFIG)
    return StoredAdapter(method, config, method.read_tensors(config, tensors, folder / CONFIG))


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
    stored = take_frozen(model, stored, folder)
    method = stored.method(settings)
    method.read_beside(folder)
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


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name of the task that a transformers model's class is made for; its tasks are all of text."""
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return None
    named = (kind for ending, kind in TASK_TYPES.items() if type(model).__name__.endswith(ending))
    return next(named, None)


def _saved_modules(stored: StoredAdapter) -> list[str]:
    """Modules stored in full, by their tensors: PEFT stores resized embeddings too, which its config does not name,
    and matches names differently (its `norm` means `input_layernorm` as well). None where all of the base is stored."""
    if stored.method.stores_all:
        return []
    keys = (key.removeprefix(PREFIX) for key in stored.tensors)
    names = {key.removesuffix(".weight") for key in keys if stored.method.layer_of(key) is None}
    whole = (name for name in names if not name.endswith(".base_layer"))
    return sorted(name for name in whole if f"{PREFIX}{name}.weight" in stored.tensors)


def take_frozen(model: nn.Module, stored: StoredAdapter, folder: Path) -> StoredAdapter:
    """Moves frozen weights into the base: PEFT stores that of an adapted embedding, and of a head beside it."""
    left = dict(stored.tensors)
    for name in stored.layers():
        key = f"{PREFIX}{name}.base_layer.weight"
        weight = left.pop(key, None)
        if weight is not None:
            layer = model.get_submodule(name)
            own = cast(Tensor, getattr(layer, "base_layer", layer).weight)
            if own.shape != weight.shape:
                raise AdapterError(f"{folder}: shape of {key}", got=list(weight.shape), allowed=str(list(own.shape)))
            own.data.copy_(weight)
    return replace(stored, tensors=left)


def _match_embeddings(model: PreTrainedModel, stored: StoredAdapter, folder: Path) -> None:
    """Resizes and unties the model's embedding and head to what the adapter holds.

    An adapter trained with new tokens holds larger ones than the base; PEFT trains a tied head as a copy.
    """
    embedding, head = input_embedding(model), output_head(model)
    if embedding is None:
        return
    tied = is_tied_head(model, head)
    kept = {}
    for name, module in model.named_modules():
        if module is embedding or module is head:
            kept["head" if module is head else "embedding"] = stored.tensors.get(f"{PREFIX}{name}.weight")
    if tied and stored.method.stores_all:
        kept["head"] = kept["embedding"]
    sizes = {len(weight) for weight in kept.values() if weight is not None}
    if sizes - {embedding.weight.shape[0]}:
        if len(sizes) > 1 or None in kept.values():
            raise AdapterError(f"{folder}: new tokens, but not both the embedding and the head", fix="Save both")
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    one, other = kept.get("embedding"), kept.get("head")
    if tied and one is not other and (one is None or other is None or not torch.equal(one, other)):
        untie_head(model)
