"""An ONNX bundle in the place of a torch model: the same losses and answers are read from its logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from qlora_runtime import BundleError, TaskBundle
from torch import Tensor, nn

from qlora_kit.errors import EvalError

_NEVER = -1e9
"""A logit at padding, where no bundle gives one."""


@dataclass(frozen=True)
class _Row:
    """A row without its padding, int64 [seq] each."""

    input_ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]


class BundleModel(nn.Module):
    """Takes a batch by its names, and gives `logits`, or `start_logits` and `end_logits`, as transformers' model does.

    Raises:
        EvalError: the bundle is damaged, or of another task.
    """

    def __init__(self, folder: Path, task: str, labels: list[str]) -> None:
        super().__init__()
        self.folder = folder
        try:
            self.bundle = TaskBundle.open(folder)
        except BundleError as error:
            raise EvalError(f"{folder}: {error}", fix="Export again") from error
        self.config = SimpleNamespace(dtype=torch.float32, max_position_embeddings=self.bundle.task.max_seq_len)
        found = self.bundle.task.type, list(getattr(self.bundle.task, "labels", labels))
        if found != (task, labels):
            raise EvalError(f"{folder} is of another task", got=found, allowed=f"{task} {labels}", fix="Export again")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_unused: Any
    ) -> SimpleNamespace:
        """The same shapes as the torch model's, float32."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        lengths = attention_mask.sum(1).tolist()
        rows = [
            _Row(ids[:length].numpy(), kinds[:length].numpy()) for ids, kinds, length in zip(input_ids, types, lengths)
        ]
        try:
            found = [logits[0] for _, logits in self.bundle.run([(None, [row]) for row in rows], len(rows))]
        except BundleError as error:
            raise EvalError(f"{self.folder}: {error}", fix="Export again") from error
        if self.bundle.task.type in ("classification", "regression"):
            return SimpleNamespace(logits=torch.from_numpy(np.concatenate(found)))  # [batch, labels]
        whole = torch.full((*input_ids.shape, found[0].shape[-1]), _NEVER)  # [batch, seq, labels]
        for at, logits in enumerate(found):
            whole[at, : len(logits)] = torch.from_numpy(logits)
        if self.bundle.task.type == "question_answering":
            return SimpleNamespace(start_logits=whole[..., 0], end_logits=whole[..., 1])
        return SimpleNamespace(logits=whole)
