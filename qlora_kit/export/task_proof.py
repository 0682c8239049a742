"""What the trained model of a task says of real rows, and how far its bundle is from that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from qlora_runtime import TaskBundle
from qlora_runtime.encoder import TokenRow
from qlora_runtime.task import (
    ClassificationTask,
    QuestionAnsweringTask,
    RegressionTask,
    TaggingTask,
    TaskInfo,
)
from qlora_runtime.task_reference import TaskReference, TaskRow, TaskTolerance
from qlora_runtime.task_verify import TaskReport, compare_task, counted
from qlora_runtime.texts import TextEncoder
from qlora_runtime.windows import QuestionWindows
from qlora_runtime.words import NO_TOKEN, WordEncoder
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data.reading import eval_source
from qlora_kit.data.sources import read_rows
from qlora_kit.errors import ExportError
from qlora_kit.export.reference import Origin
from qlora_kit.export.rows import ProofRow
from qlora_kit.export.task_graph import TYPES, input_names
from qlora_kit.model.quantized import expanded
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import (
    ClassificationSettings,
    QuestionAnsweringSettings,
    RegressionSettings,
    TaggingSettings,
)
from qlora_kit.tasks.task import Task

SHIPPED_ROWS = 32
"""Rows that go into the bundle, to be checked again on other processors."""
EXACT_LOGIT = 1e-4
"""What an fp32 logit may differ by: of the largest logit, where that is more than 1."""
INT8_AGREEMENT = 0.995
INT8_LOGIT, INT8_NUMBER = 1.0, 0.1
"""What an int8 logit, or a regression's number, may differ by: shares of how far the trained model's are spread."""


@dataclass(frozen=True)
class TaskProofRow:
    """A row with the trained model's logits, and where it comes from."""

    row: TaskRow
    origin: Origin


@dataclass(frozen=True)
class TaskDistances:
    """Bundle against the trained model over all rows; see TaskReport.

    Attributes:
        training_rows: how many of the rows are not held out.
    """

    report: TaskReport
    training_rows: int

    def in_words(self) -> str:
        """What was compared, and how it came out."""
        found = self.report
        words = f"{found.rows} rows"
        if self.training_rows:
            words += f" ({self.training_rows} of them from training)"
        words += f": largest logit difference {found.max_logit_difference:.2g}"
        return words + (f", decisions {found.decisions_equal} of {found.decisions} equal" if found.decisions else "")

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        return {**self.report.distances(), "training_rows": self.training_rows}


def bundled_task(task: Task[Any], section: DataSection, model: PreTrainedModel) -> TaskInfo:
    """The task as a bundle's manifest says it.

    Raises:
        ExportError: there are no bundles for this task.
    """
    settings, length = task.settings, min(section.max_seq_len, context_length(model))
    if isinstance(settings, ClassificationSettings):
        return ClassificationTask(tuple(task.labels), settings.multi_label, length)
    if isinstance(settings, RegressionSettings):
        return RegressionTask(length)
    if isinstance(settings, TaggingSettings):
        return TaggingTask(tuple(task.labels), settings.scheme, length)
    if isinstance(settings, QuestionAnsweringSettings):
        return QuestionAnsweringTask(settings.stride, settings.max_answer_tokens, settings.unanswerable, length)
    raise ExportError(
        f"task.type {settings.type} has no bundles",
        allowed="causal_lm, classification, regression, tagging, question_answering, seq2seq",
        fix="Use RUN/adapter beside its base",
    )


def context_length(model: PreTrainedModel) -> int:
    """The most tokens of a row; RoBERTa and kin count positions from behind their padding."""
    positions = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return positions - int(padding) - 1
    return positions


def task_rows(
    model: PreTrainedModel,
    task: Task[Any],
    info: TaskInfo,
    chosen: Sequence[ProofRow],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TaskProofRow]:
    """The trained model's own logits on the rows on which bundles are proven, read as the runtime reads them.

    Raises:
        ExportError: the runtime makes other tokens of a row than training did.
    """
    origins = {(row.source, row.row): origin for row, origin in chosen}
    names, encode = input_names(model, tokenizer), row_encoder(info, tokenizer)
    found: list[TaskProofRow] = []
    with expanded(model, model.dtype):
        for place, example in examples_at(task, section, set(origins)):
            rows = encode(example)
            check_same_tokens(place, [row for row, _ in rows], chosen)
            found += [
                TaskProofRow(answered(model, names, info, row, places), origins[place])
                for row, places in rows
                if places or not isinstance(info, TaggingTask)
            ]
    return found


def prove(bundle: TaskBundle, rows: Sequence[TaskProofRow], tolerance: TaskTolerance) -> TaskDistances:
    """How far an open bundle is from the trained model on all rows."""
    report = compare_task(bundle, TaskReference([proof.row for proof in rows], tolerance))
    return TaskDistances(report, sum(proof.origin != "held_out" for proof in rows))


def shipped(rows: Sequence[TaskProofRow], tolerance: TaskTolerance) -> TaskReference:
    """The part of the proof that the bundle carries."""
    return TaskReference([proof.row for proof in rows[:: -(-len(rows) // SHIPPED_ROWS)]], tolerance)


def tolerance_of(profile: str, info: TaskInfo, rows: Sequence[TaskProofRow]) -> TaskTolerance:
    """What a bundle of a profile may differ by, in the unit of this model's logits."""
    logits = np.concatenate([proof.row.logits.ravel() for proof in rows]).astype(np.float64)
    if profile == "fp32":
        limit = EXACT_LOGIT * max(1.0, float(np.abs(logits).max()))
        return TaskTolerance(limit, 1.0, margin=4 * limit)  # two sums of two logits each decide on an answer
    share = INT8_NUMBER if isinstance(info, RegressionTask) else INT8_LOGIT
    return TaskTolerance(share * float(logits.std()), INT8_AGREEMENT, margin=0.0)


def recorded(tolerance: TaskTolerance) -> dict[str, Any]:
    """The limits, as the manifest records them."""
    return asdict(tolerance)


Place = tuple[int, int]
"""Index of a source, and the row's number in it."""
PlacedRow = tuple[TokenRow, tuple[int, ...]]
"""A row, and the places that TaskRow says."""


def examples_at(task: Task[Any], section: DataSection, places: set[Place]) -> Iterator[tuple[Place, Any]]:
    """The examples at some places, read from their sources again."""
    sources = [*section.sources(), *filter(None, [eval_source(section)])]
    for index, source in enumerate(sources):
        parser = task.parser(section, source)
        for raw in read_rows(source):
            if (index, raw.number) in places and isinstance(raw.value, dict):
                yield (index, raw.number), parser.parse(raw.number, raw.value)


def row_encoder(info: TaskInfo, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], list[PlacedRow]]:
    """What makes the runtime's rows of an example."""
    library = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if isinstance(info, TaggingTask):
        words = WordEncoder(library, info.max_seq_len)
        return lambda example: [
            (row, tuple(int(place) for place in row.places if place != NO_TOKEN)) for row in words.encode(example.words)
        ]
    if isinstance(info, QuestionAnsweringTask):
        windows = QuestionWindows(library, info.max_seq_len, info.stride)
        return lambda example: [(row, row.context) for row in windows.encode(example.question, example.context)]
    texts = TextEncoder(library, info.max_seq_len)
    return lambda example: [(texts.encode(example.text if example.pair is None else (example.text, example.pair)), ())]


def check_same_tokens(place: Place, rows: Sequence[TokenRow], chosen: Sequence[ProofRow]) -> None:
    """Raises ExportError where training made other tokens of the row at `place` than the runtime's `rows`."""
    made = Counter(tuple(row.input_ids.tolist()) for row in rows)
    for row, _ in chosen:
        if (row.source, row.row) == place and not row.truncated and tuple(row.input_ids.tolist()) not in made:
            raise ExportError(
                f"row {row.row} of the proof has other tokens in the runtime than it had in training",
                fix="Report this; train again if the tokenizer's files were changed",
            )


@torch.no_grad()
def answered(
    model: PreTrainedModel, names: list[str], info: TaskInfo, row: TokenRow, places: tuple[int, ...]
) -> TaskRow:
    """Runs the model on one row alone, without padding."""
    ids = torch.tensor(row.input_ids[None], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if TYPES in names:
        inputs[TYPES] = torch.tensor(row.type_ids[None], device=model.device)
    found = model(**inputs, return_dict=True)
    if isinstance(info, QuestionAnsweringTask):
        logits = torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)  # [seq, 2]
    else:
        logits = found.logits if found.logits.ndim == 2 else found.logits[0]  # [1, labels] or [seq, labels]
    return TaskRow(row.input_ids, row.type_ids, places, counted(info, places, logits.float().cpu().numpy()))
