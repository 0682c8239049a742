"""Cross-entropy through a frozen head that is held as codes: neither its weight nor the logits ever exist whole.

The vocabulary is walked through once, in pieces that are expanded, used and dropped. Log-sum-exp and gradient are
sums over the vocabulary; each keeps the largest logit so far, and shrinks when a larger one comes (the online softmax
of Milakov & Gimelshein 2018, arXiv 1805.02867, summed as in FlashAttention, Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.kernels.frozen_linear import autocast_input
from qlora_kit.kernels.token_chunks import CHUNK_LOGITS, losses_with_gradients, token_chunks

ExpandPiece = Callable[[slice, torch.dtype], Tensor]
"""Returns rows of the frozen weight [rows, width] in the dtype asked for."""


def pieced_cross_entropy(
    hidden: Tensor,
    expand: ExpandPiece,
    pieces: Sequence[slice],
    bias: Tensor | None,
    labels: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """As `linear_cross_entropy`, whose plain reference is this one's too; the backward pass only multiplies.

    Args:
        hidden: [tokens, width], any float dtype; products are made in it, sums over pieces in fp32.
        expand: gives a piece of the head's weight.
        pieces: which rows each piece has: all of the vocabulary, in order.
        bias: [vocab] or None; frozen.
        labels: int64 [tokens], each below vocab.
        chunk_logits: at most so many numbers in the logits of some tokens and a piece.

    Returns: float32 [tokens].

    Raises:
        IndexError: a label is not in the vocabulary.
    """
    vocab, rows = pieces[-1].stop, pieces[0].stop
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise IndexError(f"a label is out of bounds: {int(labels.min())} to {int(labels.max())} of {vocab} words")

    def compute(hidden: Tensor, losses: Tensor, grads: Tensor | None) -> None:
        for tokens in token_chunks(len(labels), rows, chunk_logits):
            sums = _Sums(hidden[tokens], labels[tokens], grads is not None)
            for place in pieces:
                sums.add(place, expand(place, hidden.dtype), bias)
            losses[tokens] = sums.losses()
            if grads is not None:
                grads[tokens] = sums.gradients()

    return losses_with_gradients(autocast_input(hidden), compute)


class _Sums:
    """What is known of n tokens after some pieces: largest logit, sum of exponentials, own logit (fp32 [n, 1]).

    With gradients also the sum of exponential times row, the own one left out (fp32 [n, width]), and the own row.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, wanted: bool) -> None:
        self.hidden, self.labels = hidden, labels
        self.largest = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        self.total, self.own = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        self.rows = torch.zeros_like(hidden, dtype=torch.float32) if wanted else None
        self.own_row = torch.zeros_like(hidden) if wanted else None

    def add(self, place: slice, weight: Tensor, bias: Tensor | None) -> None:
        """weight [rows, width] of the words at `place`."""
        logits = F.linear(self.hidden, weight, None if bias is None else bias[place].to(self.hidden.dtype)).float()
        inside = ((self.labels >= place.start) & (self.labels < place.stop)).nonzero().squeeze(1)
        at = self.labels[inside] - place.start
        self.own[inside, 0] = logits[inside, at]
        before, self.largest = self.largest, torch.maximum(self.largest, logits.amax(1, keepdim=True))
        powers, shrunk = logits.sub_(self.largest).exp_(), before.sub_(self.largest).exp_()
        self.total.mul_(shrunk).add_(powers.sum(1, keepdim=True))
        if self.rows is not None and self.own_row is not None:
            self.own_row[inside] = weight[at]
            powers[inside, at] = 0  # a sure token's own part all but cancels: it is added in fp32, at the end
            self.rows.mul_(shrunk).add_(powers.to(weight.dtype) @ weight)

    def losses(self) -> Tensor:
        """[n]"""
        return (self.largest + self.total.log() - self.own).squeeze(1)

    def gradients(self) -> Tensor:
        """[n, width] of each token's own loss: the sum over words of (probability - is it the label) times row."""
        assert self.rows is not None and self.own_row is not None
        surplus = (self.own - self.largest).exp_() / self.total - 1  # [n, 1]
        return self.rows.div_(self.total).addcmul_(surplus, self.own_row.float())
