"""Which reader a task's outputs need."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_kit.errors import EvalError
from qlora_kit.eval.generating_form import TextReader
from qlora_kit.eval.task_answers import AnswerReader, LabelReader, LabelsReader, NumberReader
from qlora_kit.eval.token_answers import SpanReader, TagReader
from qlora_kit.export.task_proof import context_length
from qlora_kit.recipe import DataSection
from qlora_kit.tasks.task import Task


def fitted(section: DataSection, model: Any) -> DataSection:
    """The section with no more tokens of a row than the model has positions for: what a bundle reads at once."""
    return section.model_copy(update={"max_seq_len": min(section.max_seq_len, context_length(model))})


def reader_of(task: Task[Any], tokenizer: PreTrainedTokenizerBase, section: DataSection) -> AnswerReader:
    """The reader of a task's outputs.

    Raises:
        EvalError: the task has none.
    """
    kind = task.settings.type
    if kind == "classification":
        return LabelsReader(task) if task.settings.multi_label else LabelReader(task)
    if kind == "image_classification":
        return LabelReader(task)
    if kind == "regression":
        return NumberReader(task)
    if kind == "tagging":
        return TagReader(task, tokenizer, section)
    if kind == "question_answering":
        return SpanReader(task, tokenizer, section)
    if task.settings.answers_with_text:
        return TextReader(task, tokenizer)
    raise EvalError(f"task.type {kind} cannot be evaluated yet", fix="Look at the losses in metrics.jsonl")
