"""An encoder-decoder whose answers are texts that it generates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_kit.data.masking import Encoded
from qlora_kit.eval.task_answers import AnswerReader, Piece, TaskAnswer
from qlora_kit.eval.task_form import TaskForm
from qlora_kit.generate import plain_generation
from qlora_kit.tasks.images import in_model_dtype
from qlora_kit.tasks.task import Batch, Task, without_labels

_STAND_IN = "-"


class TextReader(AnswerReader):
    """A generated text."""

    columns: Sequence[str] = ("generated_text",)

    def __init__(self, task: Task[Any], tokenizer: Any) -> None:
        """`tokenizer`: or the processor that holds one."""
        super().__init__(task)
        self.tokenizer: PreTrainedTokenizerBase = getattr(tokenizer, "tokenizer", tokenizer)

    def blank(self, example: Any) -> Any:
        return replace(example, text=_STAND_IN) if self.task.processor else replace(example, target=_STAND_IN)

    def expected(self, example: Any) -> str | list[str]:
        """A transcript; of a source all targets that are as good."""
        return str(example.text) if self.task.processor else [example.target, *example.also]

    def piece(self, output: Any, at: int, row: Encoded) -> Piece:
        """int64 [tokens]: what was generated."""
        return np.asarray(output[at].cpu().numpy())

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        text = str(self.tokenizer.decode(pieces[0].tolist(), skip_special_tokens=True)).strip()
        return TaskAnswer(text, {"generated_text": text})


class GeneratingForm(TaskForm):
    """Greedy answers of at most `max_new_tokens`, or what the decoder can say, without penalties that a model ships."""

    def __init__(
        self,
        model: nn.Module,
        task: Task[Any],
        tokenizer: Any,
        reader: TextReader,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, task, tokenizer, reader, batch_size)
        shipped: Any = model.generation_config
        starts = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "eos_token_id")
        self.generation = GenerationConfig(
            **{name: _first(getattr(shipped, name, None), getattr(model.config, name, None)) for name in starts},
            pad_token_id=reader.tokenizer.pad_token_id,
            max_new_tokens=min(max_new_tokens, _positions(model.config) - 1),
            num_beams=1,
            do_sample=False,
        )

    def _read(self, batch: Batch, output: Any = None) -> Any:
        """int64 [batch, tokens]: the generated ids; a forward pass says nothing of them."""
        model: Any = self.model
        # generate fills what is not said from what the model ships; Whisper cannot do without that.
        with nullcontext() if self.task.processor else plain_generation(model):
            inputs = in_model_dtype(model, without_labels(batch))
            return model.generate(**inputs, generation_config=self.generation)


def _positions(config: Any) -> int:
    """Tokens that the decoder can say; no limit where positions are relative."""
    found = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    return int(found or 1 << 30)


def _first(a: Any, b: Any) -> Any:
    return b if a is None else a
