"""Distillation: a teacher's probabilities guide the student beside the labels (`train.distill`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.data.masking import Encoded
from qlora_kit.kernels.distill_loss import TeacherSays, chunked_distill_losses
from qlora_kit.recipe import DistillSection
from qlora_kit.tasks.loss import kept_logits, unwrapped

Collate = Callable[[list[Encoded]], dict[str, Tensor]]
LARGE_LOGIT = 16384.0  # fp16 holds it, and bf16 exactly


class Teacher(Protocol):
    """Who knows better."""

    def prepare(self, rows: Sequence[Encoded], collate: Collate) -> None:
        """Called once before the first step, with all training rows."""

    def says(self, batch: Mapping[str, Tensor], rows: list[Encoded]) -> Callable[[slice], TeacherSays]:
        """What it says of slices of a micro batch's loss tokens, in the order of rows and places."""
        ...


class Distillation:
    """The step's loss where a teacher guides it."""

    def __init__(self, section: DistillSection, teacher: Teacher) -> None:
        self.section, self.teacher = section, teacher

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor], rows: list[Encoded]) -> Tensor:
        """The combined loss of each token that carries loss, float32 [loss tokens]."""
        says = self.teacher.says(batch, rows)
        student: Any = unwrapped(model)
        head = student.get_output_embeddings()
        hidden, labels = hidden_of_loss_tokens(model, batch)
        vocab = student.get_input_embeddings().weight.shape[0]
        section = self.section
        return chunked_distill_losses(hidden, head, labels, says, section.temperature, section.weight, vocab)


class OnlineTeacher:
    """A teacher in memory, asked at each step.

    Args:
        vocab: ids that the student has; what a larger vocabulary adds are no tokens, and are left out.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, vocab: int) -> None:
        self.model, self.temperature, self.vocab = model, temperature, vocab

    def prepare(self, rows: Sequence[Encoded], collate: Collate) -> None:
        """There is nothing to prepare."""

    @torch.no_grad()
    def says(self, batch: Mapping[str, Tensor], rows: list[Encoded]) -> Callable[[slice], TeacherSays]:
        head: Any = self.model.get_output_embeddings()
        hidden, _ = hidden_of_loss_tokens(self.model, batch)

        def of(place: slice) -> TeacherSays:
            with torch.no_grad():
                logits = head(hidden[place])[:, : self.vocab].float()
                return TeacherSays((logits / self.temperature).log_softmax(1))

        return of


def hidden_of_loss_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what goes into the head [loss tokens, width], labels int64 [loss tokens]) of the tokens that carry loss."""
    with _other_head(unwrapped(model), nn.Identity()):
        hidden, labels = kept_logits(model, batch)
    carries = labels != -100
    return hidden[carries], labels[carries]


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
