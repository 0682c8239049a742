"""Distillation: a teacher's probabilities guide the student beside the labels (`train.distill`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.data.masking import Encoded
from qlora_kit.kernels.distill_loss import TeacherSays, chunked_distill_losses
from qlora_kit.recipe import DistillSection
from qlora_kit.tasks.head import hidden_of_loss_tokens
from qlora_kit.tasks.logits import unwrapped

Collate = Callable[[list[Encoded]], dict[str, Tensor]]


class Teacher(Protocol):
    """Who knows better."""

    def prepare(self, rows: Sequence[Encoded], collate: Collate) -> str | None:
        """Called once before the first step, with all training rows; returns what the user should know, if anything."""

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

    def prepare(self, rows: Sequence[Encoded], collate: Collate) -> str | None:
        """There is nothing to prepare."""
        return None

    @torch.no_grad()
    def says(self, batch: Mapping[str, Tensor], rows: list[Encoded]) -> Callable[[slice], TeacherSays]:
        head: Any = self.model.get_output_embeddings()
        hidden, _ = hidden_of_loss_tokens(self.model, batch)

        def of(place: slice) -> TeacherSays:
            with torch.no_grad():
                logits = head(hidden[place])[:, : self.vocab].float()
                return TeacherSays((logits / self.temperature).log_softmax(1))

        return of
