"""The loss: cross-entropy summed over the tokens that carry loss, so that any split of a batch adds up the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of each token that carries loss, in fp32.

    Logits are made only at positions where some row of the batch predicts such a token: with long prompts and
    short answers that is most of the vocabulary-sized work saved.

    Args:
        batch: input_ids, attention_mask, labels: int64 [batch, seq]; labels are -100 where there is no loss.

    Returns: (losses [batch, kept], labels [batch, kept]); losses are 0 where labels are -100.
    """
    logits, labels = kept_logits(model, batch)
    return label_losses(logits, labels)[0], labels


def label_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each label, in fp32.

    Args:
        logits: [batch, seq, classes].
        labels: int64 [batch, seq]; -100 where there is no loss.

    Returns: (losses [batch, seq], counted bool [batch, seq]); losses are 0 where not counted.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape), labels != -100


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


def count_loss_tokens(labels: Tensor) -> int:
    """Tokens of [batch, seq] labels that `token_losses` sums over (the first token of a row predicts nothing)."""
    return int((labels[:, 1:] != -100).sum())


@torch.no_grad()
def row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(summed loss float32 [batch], loss tokens int64 [batch]) of each row."""
    losses, labels = token_losses(model, batch)
    return row_sums(losses, labels != -100)


def row_sums(losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(sum float32 [batch], number int64 [batch]) of the counted losses of each row, both [batch, n]."""
    return losses.double().sum(1).float(), counted.sum(1)


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel; the model itself where nothing wraps it."""
    return getattr(model, "module", model)


@cache
def _takes_logits_to_keep(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
