"""How a form of the model is asked: losses of whole rows, and answers to prompts, by torch or by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from qlora_runtime import Bundle, BundleError, Sampling
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data.collate import collate, on_device
from qlora_kit.data.masking import Encoded
from qlora_kit.data.template import stop_token_ids
from qlora_kit.errors import EvalError
from qlora_kit.export.verify import log_softmax
from qlora_kit.generate import decode, generate_greedily
from qlora_kit.model.quantized import expanded
from qlora_kit.tasks.loss import row_losses

RowLoss = tuple[float, int]
"""Summed loss in nats, and the tokens it was summed over."""


class Scorer(Protocol):
    """One form of the model."""

    def losses(self, rows: Sequence[Encoded]) -> list[RowLoss]: ...
    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]: ...


class TorchScorer:
    """Scores a torch model, rows batched by length."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    def losses(self, rows: Sequence[Encoded]) -> list[RowLoss]:
        found: dict[int, RowLoss] = {}
        for places in by_length(rows, self.batch_size):
            batch = collate([rows[place] for place in places], pad_id=self.tokenizer.pad_token_id)
            sums, tokens = row_losses(self.model, on_device(batch, self.model.device))
            found |= zip(places, zip(sums.tolist(), tokens.tolist()))
        return [found[place] for place in range(len(rows))]

    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        with expanded(self.model, self.model.dtype):
            asked = [list(prompt) for prompt in prompts]
            ids = generate_greedily(self.model, self.tokenizer, asked, max_new_tokens, self.batch_size)
        ends = set(stop_token_ids(self.tokenizer))
        return [decode(self.tokenizer, _until(answer, ends)) for answer in ids]


class BundleScorer:
    """Scores an ONNX bundle with the runner that ships it."""

    def __init__(self, bundle: Bundle, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.bundle, self.tokenizer, self.batch_size = bundle, tokenizer, batch_size

    def losses(self, rows: Sequence[Encoded]) -> list[RowLoss]:
        found: dict[int, RowLoss] = {}
        for places in by_length(rows, self.batch_size):
            batch = collate([rows[p] for p in places], pad_id=self.tokenizer.pad_token_id)
            with _said(self.bundle):
                logits = self.bundle.logits(batch["input_ids"].numpy(), batch["attention_mask"].numpy())
            for place, row_logits in zip(places, logits):
                labels = rows[place].labels
                kept = np.flatnonzero(labels[1:] != -100)
                log_p = log_softmax(row_logits[kept])[np.arange(len(kept)), labels[kept + 1]]
                found[place] = (float(-log_p.sum()), len(kept))
        return [found[place] for place in range(len(rows))]

    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        sampling = Sampling(max_new_tokens=max_new_tokens)
        ends = set(stop_token_ids(self.tokenizer))
        with _said(self.bundle):
            ids = [[*self.bundle.stream(list(prompt), sampling)] for prompt in prompts]
        return [decode(self.tokenizer, _until(answer, ends)) for answer in ids]


@contextmanager
def _said(bundle: Bundle) -> Iterator[None]:
    """What the runner refuses, as an error of ours that names the bundle."""
    try:
        yield
    except BundleError as error:
        raise EvalError(f"{bundle.directory}: {error}", fix="Shorten the rows, or export again") from error


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def by_length(rows: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Places of the rows in batches of similar length, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place].input_ids), place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
