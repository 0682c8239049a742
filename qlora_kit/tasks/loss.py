"""The loss: cross-entropy summed over the tokens that carry loss, so that any split of a batch adds up the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.tasks.head import losses_at_head, takes_losses_at_head
from qlora_kit.tasks.logits import kept_logits


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of each token that carries loss, in fp32.

    Logits are made for such tokens only, a chunk of them at a time. A model that changes what its head gives (a soft
    cap) makes all of them, at positions where some row of the batch predicts such a token.

    Args:
        batch: input_ids, attention_mask, labels: int64 [batch, seq]; labels are -100 where there is no loss.

    Returns: (losses [batch, kept], labels [batch, kept]); losses are 0 where labels are -100.
    """
    if takes_losses_at_head(model):
        return losses_at_head(model, batch)
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
