"""A causal model's logits, made only where some row of a batch predicts a token that carries loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_READS_BACK: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def kept_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits [batch, kept, vocab], labels [batch, kept]) at positions where some row predicts a token with loss."""
    targets = batch["labels"][:, 1:]  # position p predicts token p + 1
    kept = (targets != -100).any(0).nonzero().squeeze(1)  # [kept]
    mask = None if needs_no_mask(model, batch["attention_mask"]) else batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
    model_class: Any = type(unwrapped(model))
    if _takes_logits_to_keep(model_class):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, kept]
    return logits, targets[:, kept]


def needs_no_mask(model: nn.Module, mask: Tensor) -> bool:
    """Whether padding is behind the tokens and no token reads what is behind it: then a mask [batch, seq] changes
    nothing but the cost, as attention without one takes its fast path and keeps no [seq, seq] matrix."""
    plain: Any = unwrapped(model)
    if not isinstance(plain, PreTrainedModel) or not bool(mask[:, 0].all()):
        return False
    if plain not in _READS_BACK:
        _READS_BACK[plain] = reads_only_back(plain)
    return _READS_BACK[plain]


@torch.no_grad()
def reads_only_back(model: PreTrainedModel) -> bool:
    """Whether other tokens behind it leave a token's logits as they are, to the bit; measured on two short rows."""
    embedding: Any = model.get_input_embeddings()
    training, vocab, found = model.training, embedding.weight.shape[0], []
    try:
        model.eval()
        for behind in ((0, 0, 0), (3, 1, 2)):
            ids = torch.tensor([[1, 2, 3, 2, 1, *behind]], device=model.device) % vocab
            found.append(model(input_ids=ids, attention_mask=None, use_cache=False).logits[:, :5])
    finally:
        model.train(training)
    return torch.equal(*found)


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel; the model itself where nothing wraps it."""
    return getattr(model, "module", model)


@cache
def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
