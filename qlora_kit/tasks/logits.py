"""A causal model's logits, made only where some row of a batch predicts a token that carries loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn


def kept_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits [batch, kept, vocab], labels [batch, kept]) at positions where some row predicts a token with loss."""
    targets = batch["labels"][:, 1:]  # position p predicts token p + 1
    kept = (targets != -100).any(0).nonzero().squeeze(1)  # [kept]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    model_class: Any = type(unwrapped(model))
    if _takes_logits_to_keep(model_class):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, kept]
    return logits, targets[:, kept]


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel; the model itself where nothing wraps it."""
    return getattr(model, "module", model)


@cache
def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
