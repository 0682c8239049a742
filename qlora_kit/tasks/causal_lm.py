"""Causal language modelling: the next token, given those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from qlora_kit.data.collate import collate
from qlora_kit.data.kinds import LANGUAGE, Parser
from qlora_kit.data.masking import Encoded
from qlora_kit.errors import ModelError
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

    def check_base(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError for an encoder: it sees the token that it is to say, unless its config says is_decoder."""
        model_type = config.get("model_type")
        encoders = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
        if model_type in encoders and not config.get("is_decoder"):
            raise ModelError(
                "task.type causal_lm cannot be taught to an encoder: it reads what comes after a token too",
                got=model_type,
                allowed="decoders such as Llama, Qwen, Mistral",
                fix="Take such a base, or task.type: classification or tagging",
            )

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
