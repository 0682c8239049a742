"""Extractive question answering: the tokens where the answer starts and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from qlora_runtime.errors import PromptTooLongError
from qlora_runtime.windows import NULL, QuestionWindows, Window
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import Encoded
from qlora_kit.data.task_examples import Answer, QuestionOnText
from qlora_kit.errors import DataError, ModelError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import QuestionAnsweringSettings
from qlora_kit.tasks.encoding import backend, second_text
from qlora_kit.tasks.task import Task, without_labels


class QuestionAnswering(Task[QuestionAnsweringSettings]):
    """Two cross-entropies over the tokens of a window: of the answer's first token and of its last.

    A window that does not hold the whole answer points to its first token, [CLS] (Devlin et al. 2018, section 4.3). Of
    several accepted answers the first is learned.
    """

    auto_class = "AutoModelForQuestionAnswering"

    def check_base(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError for a decoder: it writes no [CLS], and reads a question without what follows it."""
        model_type = config.get("model_type")
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise ModelError(
                "task.type question_answering cannot be taught to a decoder",
                got=model_type,
                allowed="encoders such as BERT, RoBERTa, DistilBERT, ModernBERT",
                fix="Take such a base, or task.type: causal_lm with the answer as completion",
            )

    def encode(
        self, example: QuestionOnText, tokenizer: PreTrainedTokenizerBase, section: DataSection
    ) -> list[Encoded]:
        """The windows over the context.

        Raises:
            RowError: the question leaves too little room for the context; no window is cut, whatever data.overlong.
            DataError: the tokenizer writes no token first that could stand for no answer.
        """
        try:
            windows = question_windows(tokenizer, section.max_seq_len, self.settings.stride).encode(
                example.question, example.context
            )
        except PromptTooLongError as error:
            fix = "Raise data.max_seq_len, or set data.overlong: skip"
            raise RowError(str(error), reason="overlong", fix=fix) from None
        _require_cls(windows[0], tokenizer)
        answer = next(iter(example.answers), None)
        return [_encoded(window, answer) for window in windows]

    def label_tensor(self, rows: Sequence[Encoded]) -> Tensor:
        """int64 [batch, 2]: first and last token of the answer."""
        return torch.from_numpy(np.stack([row.labels for row in rows])).long()

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Padding takes no part: a row's losses are the same in any batch."""
        out, labels = model(**without_labels(batch)), batch["labels"]
        logits = torch.stack([out.start_logits, out.end_logits], dim=1).float()  # [batch, 2, seq]
        logits = logits.masked_fill(batch["attention_mask"][:, None] == 0, -torch.inf)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return losses, torch.ones_like(losses, dtype=torch.bool)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return batch["labels"].numel()

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        """The window, the answer between ⟦ and ⟧."""
        first, last = row.labels
        if last == NULL:
            return f"{tokenizer.decode(row.input_ids)}\n→ no answer in this window"
        parts = np.split(row.input_ids, [first, last + 1])
        before, answer, after = (tokenizer.decode(part) for part in parts)
        return f"{before} ⟦{answer.strip()}⟧ {after}"


@lru_cache(maxsize=4)
def question_windows(tokenizer: PreTrainedTokenizerBase, max_seq_len: int, stride: int) -> QuestionWindows:
    """The runtime's windows over long contexts, made once for a tokenizer."""
    return QuestionWindows(backend(tokenizer), max_seq_len, stride)


def _encoded(window: Window, answer: Answer | None) -> Encoded:
    found = window.tokens_of(answer.start, answer.start + len(answer.text)) if answer else None
    labels = np.array(found or (NULL, NULL), dtype=np.int32)  # [2]
    return Encoded(window.input_ids.astype(np.int32), labels, second=second_text(window.type_ids))


def _require_cls(window: Window, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.cls_token_id is None or window.input_ids[NULL] != tokenizer.cls_token_id:
        raise DataError(
            "this tokenizer writes no [CLS] first, to which a window without the answer could point",
            got=tokenizer.convert_ids_to_tokens(int(window.input_ids[NULL])),
            allowed="encoders such as BERT, RoBERTa, DistilBERT, ModernBERT",
            fix="Take such a base",
        )
