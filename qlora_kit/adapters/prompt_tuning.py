"""Prompt tuning: trained vectors stand before the embedded input (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.files import PREFIX
from qlora_kit.adapters.inject import inject_layers
from qlora_kit.adapters.method import DTYPES, Method, dtype_name
from qlora_kit.adapters.settings import PromptTuningSettings
from qlora_kit.errors import AdapterError

PARAMETER = "prompt_embeddings"
PEFT_PREFIX = "base_model."  # PEFT puts no tuner around the model here, and so leaves out one `model.`
COMMON_TOKENS = 5000  # section 3.1 of the paper draws from its vocabulary's 5000 most common; merges come in that order


class PromptTuning(Method[PromptTuningSettings]):
    """`prompt_embeddings` [tokens, hidden], a parameter of the model, put before the input by a hook on it.

    What calls the model sees its own positions alone: mask, position ids and logits_to_keep are shifted, the logits
    are those of the caller's tokens. A cache that holds the prompt is told by not being empty.
    """

    peft_type = "PROMPT_TUNING"
    stored_bare: ClassVar[tuple[str, ...]] = (PARAMETER,)
    cannot_merge = "virtual tokens are no weights of the base: they stand before its input"

    def __init__(self, settings: PromptTuningSettings) -> None:
        super().__init__(settings)
        self.text_ids: list[int] = []

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.settings.init_text is None:
            return
        self.text_ids = tokenizer(self.settings.init_text, add_special_tokens=False)["input_ids"]
        if not self.text_ids:
            raise AdapterError("adapter.init_text holds no token", got=self.settings.init_text, fix="Give more text")

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        """Raises an AdapterError where the model holds an adapter, or its forward takes no logits_to_keep."""
        if virtual_tokens(model):
            raise AdapterError("the model already holds an adapter", fix="Load the base again")
        if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            raise AdapterError(
                f"adapter.method prompt_tuning: {type(model).__name__} takes no logits_to_keep", fix="Use lora"
            )
        inject_layers(model, self.settings, None, [])
        embedding: Any = model.get_input_embeddings()
        stored = targets is not None  # the vectors are filled in by the caller
        start = torch.zeros(self.settings.tokens, _width(embedding)) if stored else self._start(embedding)
        prompt = start.bfloat16().to(model.device, DTYPES[self.settings.dtype])  # alike in every dtype
        model.register_parameter(PARAMETER, nn.Parameter(prompt))
        model.register_forward_pre_hook(put_in_front, with_kwargs=True)
        return []

    def _start(self, embedding: Any) -> Tensor:
        """The first vectors, float32 [tokens, hidden]."""
        tokens = self.settings.tokens
        if self.settings.init == "random":
            return torch.rand(tokens, _width(embedding)) - 0.5
        if self.settings.init == "text":
            if not self.text_ids:
                raise AdapterError("adapter.init text needs the tokenizer", fix="Call prepare before inject")
            known = torch.tensor(self.text_ids)
        else:
            known = torch.randperm(min(COMMON_TOKENS, embedding.weight.shape[0]))
        ids = known.repeat(-(-tokens // len(known)))[:tokens]
        with torch.no_grad():
            return embedding(ids.to(embedding.weight.device)).float().cpu()

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        """As PEFT writes it; how the vectors began is left out, for which PEFT would want a tokenizer."""
        return {
            "num_virtual_tokens": self.settings.tokens,
            "token_dim": model.get_parameter(PARAMETER).shape[1],
            "num_transformer_submodules": 1,
            "num_layers": model.config.num_hidden_layers,
            "num_attention_heads": model.config.num_attention_heads,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        submodules = config.get("num_transformer_submodules")
        if submodules not in (None, 1):
            raise AdapterError(f"{origin}: num_transformer_submodules", got=submodules, allowed="1")

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> PromptTuningSettings:
        prompt = tensors.get(PARAMETER)
        if prompt is None or prompt.dim() != 2:
            shape = None if prompt is None else list(prompt.shape)
            raise AdapterError(f"{origin.parent}: tensor {PARAMETER}", got=shape, allowed="[tokens, hidden]")
        return PromptTuningSettings(tokens=prompt.shape[0], dtype=dtype_name(tensors, (PARAMETER,)))

    @classmethod
    def read_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
        """Modules trained in full lie under PEFT_PREFIX; under PREFIX in files that older versions of this toolkit
        wrote, whose configuration names them in full and lacks PEFT's `auto_mapping`."""
        saved = () if "auto_mapping" in config else tuple(config.get("modules_to_save") or ())
        old = tuple(f"{PREFIX}{name}." for name in saved)
        known = {key: key if key == PARAMETER or key.startswith(old) else _with_prefix(key) for key in tensors}
        return {known[key]: tensor for key, tensor in tensors.items()}

    @classmethod
    def write_tensors(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            PEFT_PREFIX + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key: tensor
            for key, tensor in tensors.items()
        }


def virtual_tokens(model: nn.Module) -> int:
    """How many tokens of the model's context stand before every input."""
    prompt = getattr(model, PARAMETER, None)
    return 0 if prompt is None else len(prompt)


def put_in_front(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """A forward pre-hook: what the model is called with, the prompt being part of its sequence."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    inputs = dict(zip(names, args)) | kwargs
    prompt = getattr(model, PARAMETER)
    count, cache = len(prompt), inputs.get("past_key_values")
    embedded = inputs.get("inputs_embeds")
    length = (inputs["input_ids"] if embedded is None else embedded).shape[1]
    positions = inputs.get("position_ids")
    if (mask := inputs.get("attention_mask")) is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise AdapterError("prompt tuning needs an attention mask [batch, seq]", fix="Use a dynamic cache")
        inputs["attention_mask"] = torch.cat((mask.new_ones(len(mask), count), mask), 1)
        if positions is None and "position_ids" in names:
            positions = _places(mask, length)
    if cache is not None and cache.get_seq_length() > 0:  # the prompt is in it
        if positions is not None:
            inputs["position_ids"] = positions + count
        return (), inputs
    if embedded is None:
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))  # [batch, seq, hidden]
    inputs["inputs_embeds"] = torch.cat((prompt.to(embedded.dtype).expand(len(embedded), -1, -1), embedded), 1)
    if positions is not None:
        front = torch.arange(count, device=positions.device).expand(len(positions), -1)
        inputs["position_ids"] = torch.cat((front, positions + count), 1)
    keep = inputs.get("logits_to_keep", 0)
    if isinstance(keep, int):
        keep = torch.arange(length, device=embedded.device)[-keep:]
    inputs["logits_to_keep"] = keep + count
    return (), inputs


def _places(mask: Tensor, length: int) -> Tensor | None:
    """Positions of the last `length` tokens, int64 [batch, length], where rows of `mask` [batch, seq] are padded on
    the left: that padding would stand between prompt and text, and does not count. None where none is."""
    if bool(mask[:, 0].all()):
        return None
    padding = mask.long().argmax(1, keepdim=True)  # the first token that is none
    return (torch.arange(mask.shape[1], device=mask.device) - padding).clamp_min(0)[:, -length:]


def _with_prefix(key: str) -> str:
    return PREFIX + key.removeprefix(PEFT_PREFIX)


def _width(embedding: Any) -> int:
    return int(embedding.weight.shape[1])
