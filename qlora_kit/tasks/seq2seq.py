"""Sequence to sequence: the tokens of a target text, given a source text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.task_examples import SourceTarget
from qlora_kit.errors import DataError, ModelError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import Seq2SeqSettings
from qlora_kit.tasks.encoding import encode_texts
from qlora_kit.tasks.logits import unwrapped
from qlora_kit.tasks.loss import label_losses
from qlora_kit.tasks.task import Task, without_labels


class Seq2Seq(Task[Seq2SeqSettings]):
    """Cross-entropy of each token of the target, with an encoder-decoder of T5's or BART's kind."""

    auto_class = "AutoModelForSeq2SeqLM"
    fresh_head = False
    perplexity = True

    def encode(self, example: SourceTarget, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> list[Encoded]:
        """The source with task.source_prefix before it, and the target's tokens as labels.

        A target that is cut loses its end token too: the model must not learn to stop there.
        """
        labels, limit = target_ids(example.target or "", tokenizer), self.settings.max_target_len
        if len(labels) > limit and section.overlong != "truncate":
            raise RowError(
                f"the target has {len(labels)} tokens, more than task.max_target_len {limit}",
                reason="overlong",
                fix="Raise task.max_target_len, or set data.overlong to skip or truncate",
            )
        source = self.settings.source_prefix + example.source
        row = encode_texts(source, None, labels[:limit], tokenizer, section)
        return [replace(row, truncated=row.truncated or len(labels) > limit)]

    def check_base(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError for an encoder or a decoder alone. Kinds that transformers does not have are let through:
        they may bring their own code."""
        model_type, encoder_decoders = config.get("model_type"), MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if model_type in CONFIG_MAPPING_NAMES and model_type not in encoder_decoders:
            raise ModelError(
                "task.type seq2seq cannot be taught to this base: it is no encoder-decoder",
                got=model_type,
                allowed="encoder-decoders such as T5, BART",
                fix="Take such a base, or with a decoder task.type: causal_lm, the target as completion",
            )

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises DataError where targets may be longer than the decoder's positions."""
        check_target_len(self.settings.max_target_len, getattr(model.config, "max_position_embeddings", None))

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return target_losses(model, without_labels(batch), batch["labels"])

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of the targets."""
        return int((batch["labels"] != IGNORED).sum())


def target_ids(text: str, tokenizer: Any) -> np.ndarray:
    """int32 [tokens]: what the decoder is to say, the end of sequence included."""
    ids = tokenizer(text_target=text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id not in ids:  # mBART writes the language after it
        ids = [*ids, tokenizer.eos_token_id]
    return np.array(ids, dtype=np.int32)


def check_target_len(wanted: int, positions: int | None) -> None:
    """Raises DataError where targets may be longer than a decoder's positions; None: it has no such limit."""
    most = wanted if positions is None else positions // 8 * 8  # batches are padded to a multiple of 8
    if wanted > most:
        raise DataError(
            "task.max_target_len is more than the model can say",
            got=wanted,
            allowed=f"2 to {most}",
            fix=f"Set task.max_target_len={most}",
        )


def target_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(losses float32, counted bool), both [batch, target tokens], of an encoder-decoder.

    Args:
        inputs: of the encoder.
        labels: int64 [batch, target tokens], -100 after the end.
    """
    logits = model(**inputs, **_decoder_inputs(model, labels), use_cache=False).logits  # [batch, target tokens, vocab]
    return label_losses(logits, labels)


def _decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """What the decoder reads: the labels after the model's own start token; some models shift only in their forward."""
    shift = getattr(unwrapped(model), "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
