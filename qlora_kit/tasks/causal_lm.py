"""Causal language modelling: the next token, given those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.collate import collate
from qlora_kit.data.kinds import LANGUAGE, Parser
from qlora_kit.data.masking import Encoded
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.task_settings import CausalLmSettings
from qlora_kit.tasks.loss import count_loss_tokens, token_losses
from qlora_kit.tasks.task import Batch, Task


class CausalLm(Task[CausalLmSettings]):
    """The labels are the tokens themselves."""

    auto_class = "AutoModelForCausalLM"
    fresh_head = False
    own_labels = False
    perplexity = True

    def parser(self, section: DataSection, source: DataSource) -> Parser:
        return LANGUAGE.parser(section, source)

    def encode(self, example: Any, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        return LANGUAGE.encode(example, tokenizer, section)

    def collate(self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> Batch:
        return collate(rows, pad_id=tokenizer.pad_token_id)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses, labels = token_losses(model, batch)
        return losses, labels != -100

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return count_loss_tokens(batch["labels"])
