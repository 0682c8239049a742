"""Cross-entropy straight from the output head's inputs: logits of all tokens never exist at once.

The idea is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of Liger Kernel's fused linear
cross-entropy (Hsu et al. 2024, arXiv 2410.10989): what a chunk of logits is needed for, its loss and its gradient, is
computed while the chunk is there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.frozen_linear import ExpandWeight, autocast_input
from qlora_kit.kernels.token_chunks import CHUNK_LOGITS, chunked_losses, losses_with_gradients, token_chunks


def linear_cross_entropy_reference(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """The plain path: whole logits. Shapes as in `head_cross_entropy`."""
    return F.cross_entropy(head(hidden).float(), labels, reduction="none")


def head_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, vocab: int, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """The same through any head, trained or not: chunks are computed again in the backward pass.

    Args:
        hidden: [tokens, width], what goes into the output head.
        head: gives the logits [n, vocab] of n rows.
        labels: int64 [tokens], each below `vocab`.
        vocab: width of the logits.
        chunk_logits: at most so many numbers in a chunk's logits.

    Returns: float32 [tokens].
    """

    def losses(part: Tensor, place: slice) -> Tensor:
        return linear_cross_entropy_reference(part, head, labels[place])

    return chunked_losses(hidden, losses, vocab, chunk_logits)


def linear_cross_entropy(
    hidden: Tensor, expand: ExpandWeight, bias: Tensor | None, labels: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> Tensor:
    """The same through a frozen linear head, its logits computed once; the backward pass only multiplies.

    Args:
        hidden: [tokens, width], any float dtype; products are made in it, the log-sum-exp in fp32.
        expand: gives the head's weight [vocab, width].
        bias: [vocab] or None; frozen.
        labels: int64 [tokens], each below vocab.
        chunk_logits: at most so many numbers in a chunk's logits.

    Returns: float32 [tokens].
    """

    def compute(hidden: Tensor, losses: Tensor, grads: Tensor | None) -> None:
        weight = expand(hidden.dtype)  # [vocab, width]
        for place in token_chunks(len(labels), len(weight), chunk_logits):
            _chunk(hidden[place], weight, bias, labels[place], losses[place], None if grads is None else grads[place])

    return losses_with_gradients(autocast_input(hidden), compute)


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Tensor, grads: Tensor | None
) -> None:
    """Writes losses [n] and, where wanted, the gradients [n, width] of each; its logits are gone before the next."""
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()
    log_sum = logits.logsumexp(1, keepdim=True)  # [n, 1]
    own = labels[:, None]
    losses.copy_((log_sum - logits.gather(1, own)).squeeze(1))
    if grads is not None:
        by_logit = logits.sub_(log_sum).exp_()  # softmax; less one at the label
        by_logit.scatter_(1, own, by_logit.gather(1, own) - 1)
        torch.mm(by_logit.to(hidden.dtype), weight, out=grads)
