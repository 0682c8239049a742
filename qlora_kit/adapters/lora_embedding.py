"""LoRA on an embedding: a low-rank table beside a frozen one (Hu et al. 2021; layout of PEFT)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.adapters.layer import AdaptedLayer
from qlora_kit.adapters.method import DTYPES
from qlora_kit.adapters.settings import LowRankSettings
from qlora_kit.errors import AdapterError


class LoraEmbedding(AdaptedLayer):
    """y = c (W[ids] + scaling · (B A)ᵀ[ids]), W [vocab, dim] frozen, c the factor of Gemma's embeddings (else 1).

    Args:
        base: nn.Embedding; kept as submodule `base_layer`.
        settings: rank, scaling, dropout and dtype. Dropout has no input to fall on: it drops entries of Aᵀ[ids].

    lora_embedding_A [rank, vocab] starts at zero, lora_embedding_B [dim, rank] normal: the other way round than in a
    linear layer, so that each token's row learns from its first step. A head tied to W is not changed.

    Raises:
        AdapterError: the embedding has a max_norm, which changes W at each look-up.
    """

    base_layer: nn.Embedding

    def __init__(self, base: nn.Embedding, settings: LowRankSettings) -> None:
        super().__init__(base)
        if base.max_norm is not None:
            raise AdapterError("an embedding with a max_norm cannot be adapted", fix="Leave it out of target_modules")
        self.rank, self.scaling, self.dropout = settings.rank, settings.scaling, settings.dropout
        kind: Any = {"dtype": DTYPES[settings.dtype], "device": self.device}
        self.lora_embedding_A = nn.Parameter(torch.zeros(self.rank, base.num_embeddings, **kind))
        # Drawn on the CPU, rounded to bf16: the same on every device, in every dtype.
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, self.rank).bfloat16().to(**kind))

    @property
    def weight(self) -> Tensor:
        """The frozen table [vocab, dim], for those who look for a vocabulary's size or a tied head."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 to [..., dim], in the base's dtype."""
        base = self.base_layer
        y = base(ids)
        rows = F.embedding(ids, self.lora_embedding_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        rows = F.dropout(rows, self.dropout, self.training)  # [..., rank]
        factor = getattr(base, "embed_scale", None)
        delta = self.scaling * F.linear(rows.to(y.dtype), self.lora_embedding_B.to(y.dtype))
        return y + (delta if factor is None else delta * factor.to(y.dtype))

    def delta(self) -> Tensor:
        """scaling · (B A)ᵀ, float32 [vocab, dim]."""
        product = self.lora_embedding_B.detach().float() @ self.lora_embedding_A.detach().float()
        return (self.scaling * product).T

    def merged_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        delta = self.delta()
        return {"weight": (self.base_layer.weight.detach().float() + delta, delta)}
