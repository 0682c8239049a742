"""Sequence classification and regression: one head on the whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_examples import LabelledText
from qlora_kit.data.task_labels import class_weights, names_of
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import ClassificationSettings, RegressionSettings
from qlora_kit.tasks.encoding import encode_texts
from qlora_kit.tasks.task import S, Task, without_labels


class _OneHead(Task[S]):
    """A head on the whole text: a row's losses are one each."""

    auto_class = "AutoModelForSequenceClassification"

    def encode(self, example: LabelledText, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        return [encode_texts(example.text, example.pair, self.labels_of(example), tokenizer, section)]

    def labels_of(self, example: LabelledText) -> np.ndarray:
        """int32 [n]: what is kept of the example's label."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["labels"])


class Classification(_OneHead[ClassificationSettings]):
    """One label a row (softmax), or any number of them (a sigmoid each)."""

    has_labels = True

    def __init__(self, settings: ClassificationSettings, labels: Sequence[str] = ()) -> None:
        super().__init__(settings, labels)
        self.weights = torch.ones(len(self.labels))  # [labels]

    def weigh(self, examples: Sequence[LabelledText]) -> None:
        names = (name for example in examples for name in names_of(example))
        weights = class_weights(self.settings.class_weights, names, self.labels)
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def labels_of(self, example: LabelledText) -> np.ndarray:
        ids = np.array(self.label_ids(example), dtype=np.int32)
        return np.isin(np.arange(len(self.labels)), ids).astype(np.int32) if self.settings.multi_label else ids

    def config(self) -> dict[str, Any]:
        kind = "multi_label_classification" if self.settings.multi_label else "single_label_classification"
        return {**super().config(), "problem_type": kind}

    def label_tensor(self, rows: Sequence[Encoded]) -> Tensor:
        """int64 [batch], or float32 [batch, labels] of 0 and 1 where a row may have several."""
        labels = torch.from_numpy(np.stack([row.labels for row in rows]))
        return labels.float() if self.settings.multi_label else labels[:, 0].long()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each row times its label's weight; of several labels the mean over them."""
        logits, labels = model(**without_labels(batch)).logits.float(), batch["labels"]  # [batch, labels]
        if self.settings.multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(logits, labels, reduction="none") * self.weights.to(logits.device)[labels]
        return losses[:, None], torch.ones_like(losses[:, None], dtype=torch.bool)

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        chosen = np.flatnonzero(row.labels) if self.settings.multi_label else row.labels
        return super().shown(replace(row, labels=chosen), tokenizer)


class Regression(_OneHead[RegressionSettings]):
    """One number a row, squared error."""

    def labels_of(self, example: LabelledText) -> np.ndarray:
        """The bits of a float32, as int32 [1]."""
        return np.array([example.label], dtype=np.float32).view(np.int32)

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def label_tensor(self, rows: Sequence[Encoded]) -> Tensor:
        """float32 [batch]."""
        return torch.from_numpy(np.concatenate([row.labels.view(np.float32) for row in rows]))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        predicted = model(**without_labels(batch)).logits.float()  # [batch, 1]
        losses = (predicted - batch["labels"][:, None]) ** 2
        return losses, torch.ones_like(losses, dtype=torch.bool)

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        return f"{tokenizer.decode(row.input_ids)}\n→ {row.labels.view(np.float32)[0]:g}"
