"""An encoder-decoder's ONNX bundle in the place of a torch model: the same losses and greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from qlora_runtime import BundleError, Sampling, Seq2SeqBundle
from torch import Tensor, nn
from transformers import GenerationConfig

from qlora_kit.errors import EvalError


class Seq2SeqBundleModel(nn.Module):
    """Takes batches by their names, and gives logits and generated ids as transformers' model does.

    Raises:
        EvalError: the bundle is damaged, or of another task.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        with self._as_eval_errors():
            self.bundle = Seq2SeqBundle.open(folder)
        model, task = self.bundle.manifest.model, self.bundle.task
        self.config = SimpleNamespace(
            dtype=torch.float32,
            max_position_embeddings=task.max_seq_len,
            max_target_positions=model.context_length,
        )
        self.generation_config: Any = SimpleNamespace(
            decoder_start_token_id=task.decoder_start_token_id,
            forced_bos_token_id=task.forced_bos_token_id,
            eos_token_id=list(model.eos_token_ids),
        )
        self.start_id, self.pad_id = task.decoder_start_token_id, model.pad_token_id or 0

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """int64 [batch, target]: the start token, and all labels but the last."""
        start = torch.full_like(labels[:, :1], self.start_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, self.pad_id)], dim=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, **_unused: Any
    ) -> SimpleNamespace:
        """`logits`, float32 [batch, target, vocab]."""
        with self._as_eval_errors():
            logits = self.bundle.target_logits(_sources(input_ids, attention_mask), decoder_input_ids.numpy())
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor:
        """int64 [batch, tokens]: the start token and greedy answers, padded on the right."""
        limit = generation_config.max_new_tokens
        assert limit is not None
        with self._as_eval_errors():
            answers = self.bundle.answers(_sources(input_ids, attention_mask), Sampling(max_new_tokens=limit))
        out = torch.full((len(answers), 1 + max(map(len, answers))), self.pad_id)
        for row, answer in enumerate(answers):
            out[row, : 1 + len(answer)] = torch.tensor([self.start_id, *answer])
        return out

    @contextmanager
    def _as_eval_errors(self) -> Iterator[None]:
        try:
            yield
        except BundleError as error:
            raise EvalError(f"{self.folder}: {error}", fix="Export again") from error


def _sources(input_ids: Tensor, attention_mask: Tensor) -> list[np.ndarray]:
    """Each row without its padding, int64 [source]."""
    return [ids[:length].numpy() for ids, length in zip(input_ids, attention_mask.sum(1).tolist())]
