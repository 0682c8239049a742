"""The output head of a causal model, apart from the model: what goes into it, and the losses behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.layer import LINEAR, LinearLayer, piece_expander, weight_expander
from qlora_kit.kernels.linear_cross_entropy import head_cross_entropy, linear_cross_entropy
from qlora_kit.kernels.pieced_cross_entropy import pieced_cross_entropy
from qlora_kit.tasks.logits import kept_logits, unwrapped

LARGE_LOGIT = 16384.0  # fp16 holds it, and bf16 exactly
_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models that were measured


def takes_losses_at_head(model: nn.Module) -> bool:
    """Whether the model's losses may be computed by `losses_at_head`; measured once for each model."""
    plain: Any = unwrapped(model)
    if plain not in _PLAIN_HEADS:
        _PLAIN_HEADS[plain] = isinstance(plain, PreTrainedModel) and head_gives_logits(plain)
    return _PLAIN_HEADS[plain]


def losses_at_head(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`loss.token_losses` without whole logits."""
    plain: Any = unwrapped(model)
    head = plain.get_output_embeddings()
    hidden, labels = _kept_hidden(model, batch)
    carries = labels != -100
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    if isinstance(head, LINEAR) and not any(weight.requires_grad for weight in head.parameters()):
        found = _frozen_head_losses(head, hidden[carries], labels[carries])
    else:
        vocab = plain.get_input_embeddings().weight.shape[0]
        found = head_cross_entropy(hidden[carries], head, labels[carries], vocab)
    losses[carries] = found
    return losses, labels


def _frozen_head_losses(head: LinearLayer, hidden: Tensor, labels: Tensor) -> Tensor:
    """[tokens] of hidden [tokens, width]; a head that is held as codes is expanded in pieces."""
    if (in_pieces := piece_expander(head)) is not None:
        return pieced_cross_entropy(hidden, *in_pieces, head.bias, labels)
    return linear_cross_entropy(hidden, weight_expander(head), head.bias, labels)


def hidden_of_loss_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what goes into the head [loss tokens, width], labels int64 [loss tokens]) of the tokens that carry loss."""
    hidden, labels = _kept_hidden(model, batch)
    carries = labels != -100
    return hidden[carries], labels[carries]


def _kept_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what goes into the head [batch, kept, width], labels [batch, kept]), as `kept_logits`."""
    with _other_head(unwrapped(model), nn.Identity()):
        return kept_logits(model, batch)


class _KnownLogits(nn.Module):
    """A head of the same logits [vocab] for whatever goes in, too large for a soft cap to let them through."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, kept, width] to [batch, kept, vocab], in hidden's dtype."""
        known = torch.linspace(-LARGE_LOGIT, LARGE_LOGIT, self.vocab, device=hidden.device)
        return known.to(hidden.dtype).expand(*hidden.shape[:-1], -1)


@torch.no_grad()
def head_gives_logits(model: PreTrainedModel) -> bool:
    """Whether the head, given what `hidden_of_loss_tokens` finds, gives the model's own logits.

    What a model does to its head's output is measured on known logits, over one short row. A factor commutes with a
    head without bias, and so does no harm; a soft cap bends large logits and small ones alike.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        return False
    training, ids = model.training, torch.zeros(1, 4, dtype=torch.long, device=model.device)
    embedding: Any = model.get_input_embeddings()
    known = _KnownLogits(embedding.weight.shape[0])
    try:
        with _other_head(model.eval(), known):
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    finally:
        model.train(training)
    largest = found.max().item()
    factor = largest / LARGE_LOGIT
    same = torch.allclose(found, factor * known(found), rtol=2e-2, atol=1e-3 * largest)
    return same and (getattr(head, "bias", None) is None or factor == 1)


@contextmanager
def _other_head(model: PreTrainedModel, other: nn.Module) -> Iterator[None]:
    """`other` stands in for the output head; with nn.Identity the model gives what would go into it."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, child, other)
    try:
        yield
    finally:
        setattr(holder, child, head)
