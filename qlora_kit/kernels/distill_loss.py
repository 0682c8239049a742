"""The loss of distillation: (1 - w) cross-entropy + w T² KL(teacher ‖ student) (Hinton et al. 2015, section 2.1).

Both softmaxes of the divergence are at temperature T; T² keeps its gradient's size when T changes. Chunks of tokens
go through the output head one at a time, and again in the backward pass: logits of all tokens never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.token_chunks import CHUNK_LOGITS, chunked_losses


@dataclass(frozen=True)
class TeacherSays:
    """What the teacher gives to some tokens: log-probabilities at temperature T, float32.

    Attributes:
        log_probs: [tokens, vocab], or [tokens, k] for its k likeliest ids.
        ids: int64 [tokens, k] for these k; None where the whole vocabulary is given.
    """

    log_probs: Tensor
    ids: Tensor | None = None


def distill_losses(logits: Tensor, labels: Tensor, says: TeacherSays, temperature: float, weight: float) -> Tensor:
    """The plain path: one loss for each token, float32 [tokens], from whole logits [tokens, vocab]; labels [tokens]."""
    logits = logits.float()
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="none") + weight * temperature**2 * divergence(
        logits / temperature, says
    )


def divergence(logits: Tensor, says: TeacherSays) -> Tensor:
    """KL(teacher ‖ student) of each token, float32 [tokens]; logits [tokens, vocab], divided by T already.

    Of k given ids the rest of the vocabulary is one more outcome, so that it is a divergence still, and at most the
    whole one. A teacher with a smaller vocabulary is compared on its own.
    """
    if says.ids is None:
        ours = logits[:, : says.log_probs.shape[1]].log_softmax(1)
        return (says.log_probs.exp() * (says.log_probs - ours)).sum(1)
    ours = (logits - logits.logsumexp(1, keepdim=True)).gather(1, says.ids)  # [tokens, k]
    return (says.log_probs.exp() * (says.log_probs - ours)).sum(1) + _rest(says.log_probs, ours)


def _rest(theirs: Tensor, ours: Tensor) -> Tensor:
    """The term of all ids that are not given, from the given log-probabilities [tokens, k]."""
    tiny = torch.finfo(torch.float32).eps
    rest_theirs = (1 - theirs.exp().sum(1)).clamp_min(tiny)
    rest_ours = (1 - ours.exp().sum(1)).clamp_min(tiny)
    return rest_theirs * (rest_theirs.log() - rest_ours.log())


def chunked_distill_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    teacher: Callable[[slice], TeacherSays],
    temperature: float,
    weight: float,
    vocab: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """The same from the head's inputs, chunk by chunk.

    Args:
        hidden: [tokens, width], what goes into the output head.
        head: gives the logits [n, vocab] of n rows; may be trained.
        labels: int64 [tokens].
        teacher: what the teacher says of a slice of the tokens; asked again in the backward pass.
        vocab: width of the logits.
        chunk_logits: at most so many numbers in a chunk's logits.

    Returns: float32 [tokens].
    """

    def losses(part: Tensor, place: slice) -> Tensor:
        return distill_losses(head(part), labels[place], teacher(place), temperature, weight)

    return chunked_losses(hidden, losses, vocab, chunk_logits)
