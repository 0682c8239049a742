"""What lm-eval's requests come down to, logits and completions, by a torch model or by an ONNX bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from qlora_runtime import BundleError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.collate import on_device, padded
from qlora_kit.data.masking import IGNORED
from qlora_kit.errors import EvalError
from qlora_kit.eval.code.completers import Complete, completer_of
from qlora_kit.eval.scorers import BundleScorer, TorchScorer
from qlora_kit.generate import context_length
from qlora_kit.tasks.logits import kept_logits

TokenRow = Sequence[int]


class Engine(Protocol):
    """One form of a model."""

    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    context_length: int
    """Tokens that it reads at once."""
    vocab_size: int
    complete: Complete

    def logits(self, rows: Sequence[TokenRow], kept: Sequence[int]) -> list[Tensor]:
        """The logits after each of the last `kept[k]` tokens of row k: float32 [kept[k], vocab]."""
        ...

    def positions(self, length: int, kept: int) -> int:
        """Positions at which it makes logits for a row of `length` tokens, whatever is kept of them."""
        ...


def engine_of(form: TorchScorer | BundleScorer) -> Engine:
    """An engine for a form as `eval.run.find_forms` makes them."""
    return BundleEngine(form) if isinstance(form, BundleScorer) else TorchEngine(form)


class TorchEngine:
    """A torch model: 16-bit, quantized, with an adapter or merged."""

    def __init__(self, form: TorchScorer) -> None:
        self.model, self.tokenizer, self.batch_size = form.model, form.tokenizer, form.batch_size
        self.context_length = context_length(form.model)
        self.vocab_size = int(form.model.config.vocab_size)
        self.complete = completer_of(form)

    def positions(self, length: int, kept: int) -> int:
        return kept

    @torch.no_grad()
    def logits(self, rows: Sequence[TokenRow], kept: Sequence[int]) -> list[Tensor]:
        ids = [np.asarray(row) for row in rows]
        # Labels say where logits are wanted: label p + 1 stands for the logits after token p.
        wanted = [np.full(len(row) + 1, IGNORED) for row in ids]
        for row, count in zip(wanted, kept, strict=True):
            row[-count:] = 0
        batch = {
            "input_ids": padded(ids, 0, 1),
            "attention_mask": padded([np.ones_like(row) for row in ids], 0, 1),
            "labels": padded(wanted, IGNORED, 1),
        }
        logits, labels = kept_logits(self.model, on_device(batch, self.model.device))
        return [row_logits[row_labels != IGNORED].float() for row_logits, row_labels in zip(logits, labels)]


class BundleEngine:
    """An ONNX bundle, by the runner that ships it."""

    def __init__(self, form: BundleScorer) -> None:
        self.bundle, self.tokenizer, self.batch_size = form.bundle, form.tokenizer, form.batch_size
        self.context_length = form.bundle.manifest.model.context_length
        self.vocab_size = form.bundle.manifest.model.vocab_size
        self.complete = completer_of(form)

    def positions(self, length: int, kept: int) -> int:
        return length

    def logits(self, rows: Sequence[TokenRow], kept: Sequence[int]) -> list[Tensor]:
        ids = [np.asarray(row, dtype=np.int64) for row in rows]
        mask = padded([np.ones_like(row) for row in ids], 0, 1)
        try:
            logits = self.bundle.logits(padded(ids, 0, 1).numpy(), mask.numpy())
        except BundleError as error:
            raise EvalError(f"{self.bundle.directory}: {error}", fix="Export again") from error
        return [torch.from_numpy(logits[k, len(row) - n : len(row)]) for k, (row, n) in enumerate(zip(ids, kept))]
