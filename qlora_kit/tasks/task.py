"""The interface of all tasks: how rows become batches, what the loss is, which head the model gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data.collate import padded
from qlora_kit.data.kinds import Parser
from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_labels import check_label, collect_labels, names_of
from qlora_kit.data.task_schemas import TaskRowParser
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.task_settings import TaskSettings
from qlora_kit.tasks.loss import row_sums

S = TypeVar("S", bound=TaskSettings)
Batch = dict[str, Tensor]


class Task(Generic[S]):
    """One task with its settings and the names of its labels: those that the settings give where none are given here.

    Class attributes:
        auto_class: the Auto class of transformers that makes its models.
        fresh_head: whether the model gets a head of its own, trained in full beside the adapter.
        has_labels: whether rows are given labels from a list.
        own_labels: whether labels are kept as they are (see `EncodedRows`).
        perplexity: whether the exponential of the loss means something.
        processor: the Auto class of transformers that reads its files; empty where a tokenizer does.
    """

    auto_class: ClassVar[str]
    fresh_head: ClassVar[bool] = True
    has_labels: ClassVar[bool] = False
    own_labels: ClassVar[bool] = True
    perplexity: ClassVar[bool] = False
    processor: ClassVar[str] = ""

    def __init__(self, settings: S, labels: Sequence[str] = ()) -> None:
        self.settings, self.labels = settings, list(labels or getattr(settings, "labels", ()))
        self.ids = {label: k for k, label in enumerate(self.labels)}

    def parser(self, section: DataSection, source: DataSource) -> Parser:
        """The parser of one source's rows."""
        return TaskRowParser(self.settings, section, source)

    def encode(self, example: Any, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        """The example as the model sees it: one row, or windows over one that is too long.

        Raises:
            RowError: it cannot be used.
        """
        raise NotImplementedError

    def encode_whole(self, example: Any, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        """The example as it is evaluated and predicted: where the task can, all windows of one that `encode` cuts.

        Raises:
            RowError: it cannot be used.
        """
        return self.encode(example, tokenizer, section)

    def label_ids(self, example: Any, column: str = "label") -> list[int]:
        """The outputs that an example's labels mean, in the example's order.

        Raises:
            RowError: one of them is no label.
        """
        names = names_of(example)
        for name in names:
            check_label(name, self.labels, column)
        return [self.ids[name] for name in names]

    def find_labels(self, examples: Sequence[Any]) -> list[str]:
        """The names of the labels of all training examples, in the order of the model's outputs."""
        return collect_labels(examples, self.settings)

    def weigh(self, examples: Sequence[Any]) -> None:
        """Takes from all training examples what weighs their losses."""

    def config(self) -> dict[str, Any]:
        """What the model's configuration says of the task."""
        if not self.labels:
            return {}
        return {"num_labels": len(self.labels), "id2label": dict(enumerate(self.labels)), "label2id": self.ids}

    def collate(self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> Batch:
        """The rows as one batch: `model_inputs` and `labels`."""
        return {**model_inputs(rows, tokenizer), "labels": self.label_tensor(rows)}

    def label_tensor(self, rows: Sequence[Encoded]) -> Tensor:
        """The labels of a batch."""
        return padded([row.labels for row in rows], -100)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(losses float32 [batch, n], counted bool [batch, n]): 0 where not counted."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """How many losses of a batch are counted, without computing them."""
        raise NotImplementedError

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """What a run's `tokens` count of a batch."""
        return int(batch["attention_mask"].sum())

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        """A row for people to read: its text or file, and what is to be said of it."""
        said = [self.labels[k] for k in row.labels] if self.labels else [tokenizer.decode(row.labels)]
        return f"{row.file or tokenizer.decode(row.input_ids)}\n→ {', '.join(said)}"

    def check_base(self, config: Mapping[str, Any]) -> None:
        """Raises a ModelError, before anything is loaded, where the base's config.json says that it is of a kind that
        the task cannot be taught."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises a DataError or ModelError where the task and this model, its adapter in it, do not go together."""

    @torch.no_grad()
    def row_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(summed loss float32 [batch], counted losses int64 [batch]) of each row."""
        return row_sums(*self.losses(model, batch))


def model_inputs(rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """`input_ids`, `attention_mask`, and `token_type_ids` where the model tells two texts apart: int64 [batch, seq]."""
    batch = {
        "input_ids": padded([row.input_ids for row in rows], tokenizer.pad_token_id),
        "attention_mask": padded([row.input_ids * 0 + 1 for row in rows], 0),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        places = torch.arange(batch["input_ids"].shape[1])  # [seq]
        seconds = torch.tensor([row.second if row.second >= 0 else len(places) for row in rows])  # [batch]
        batch["token_type_ids"] = (places >= seconds[:, None]).long() * batch["attention_mask"]
    return batch


def without_labels(batch: Mapping[str, Tensor]) -> Batch:
    """What of a batch the model is given."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
