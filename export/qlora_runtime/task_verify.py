"""Does a task's bundle still answer as the trained model did? Its reference.json is run and compared."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_runtime.encoder import FloatArray
from qlora_runtime.errors import ForeignFileError
from qlora_runtime.spans import best_span, null_logit
from qlora_runtime.task import (
    ClassificationTask,
    QuestionAnsweringTask,
    RegressionTask,
    TaggingTask,
    TaskInfo,
)
from qlora_runtime.task_bundle import TaskBundle
from qlora_runtime.task_reference import TaskReference, TaskRow, TaskTolerance
from qlora_runtime.verdict import Verdict

DoubleArray = npt.NDArray[np.float64]
NOWHERE = (-1, -1)  # the decision that a window holds no answer


@dataclass
class TaskReport(Verdict):
    """What verifying found.

    A decision is a row's label, one of its several labels given or not, a word's tag, or a window's answer; a
    regression has none.
    """

    rows: int = 0
    decisions: int = 0
    decisions_equal: int = 0
    max_logit_difference: float | None = None  # the largest, over all logits; None: not run
    mean_logit_difference: float | None = None

    def in_words(self) -> list[str]:
        """The measured numbers, line by line; none where nothing was run."""
        if self.max_logit_difference is None:
            return []
        lines = [f"{self.rows} rows", f"largest logit difference  {self.max_logit_difference:.6g}"]
        equal = f"same decisions            {self.decisions_equal} of {self.decisions}"
        return [*lines, equal] if self.decisions else lines


def compare_task(bundle: TaskBundle, reference: TaskReference) -> TaskReport:
    """The bundle against a reference, which need not be the one it ships with.

    Raises:
        ForeignFileError: the reference has tokens or logits that this model cannot have.
        ModelOutputError: the model's logits are not finite.
    """
    vocabulary = bundle.manifest.model.vocab_size
    report, differences = TaskReport(rows=len(reference.rows)), []
    for row, (found,) in bundle.run((row, [row]) for row in reference.rows):
        logits = counted(bundle.task, row.places, found)  # [n, k]
        if logits.shape != row.logits.shape or row.input_ids.max() >= vocabulary:
            raise ForeignFileError(
                f"reference.json has a row with logits {list(row.logits.shape)} and token ids up to "
                f"{row.input_ids.max()}; the model gives {list(logits.shape)} and knows {vocabulary}. It is "
                "a file of another bundle: export again."
            )
        differences.append(np.abs(logits.astype(np.float64) - row.logits).ravel())
        lost = regrets(bundle.task, row, logits)
        report.decisions += len(lost)
        report.decisions_equal += int((lost <= reference.tolerance.margin).sum())
    every = np.concatenate(differences)
    report.max_logit_difference, report.mean_logit_difference = (
        float(every.max(initial=0)),
        float(every.mean()),
    )
    report.reasons += _reasons(report, reference.tolerance)
    return report


def counted(task: TaskInfo, places: tuple[int, ...], logits: FloatArray) -> FloatArray:
    """The logits that a reference keeps of a row's [seq, k] or [1, k]: of tagging each word's first."""
    return logits[list(places)] if isinstance(task, TaggingTask) else logits


def regrets(task: TaskInfo, row: TaskRow, logits: FloatArray) -> DoubleArray:
    """How much, in logits, the trained model preferred its own decisions to the bundle's; 0: the same.

    Args:
        row: with the trained model's logits [n, k].
        logits: the bundle's, [n, k].

    Returns: float64 [decisions].
    """
    reference = row.logits.astype(np.float64)
    if isinstance(task, RegressionTask):
        return np.zeros(0)
    if isinstance(task, QuestionAnsweringTask):
        return np.array([_lost_span(task, row.places, reference, logits)])
    if isinstance(task, ClassificationTask) and task.multi_label:
        lost: DoubleArray = np.where((reference > 0) == (logits > 0), 0.0, np.abs(reference))
        return lost.ravel()
    chosen = np.take_along_axis(reference, logits.argmax(axis=1)[:, None], axis=1)[:, 0]  # [n]
    return np.asarray(reference.max(axis=1) - chosen)


def _lost_span(
    task: QuestionAnsweringTask, places: tuple[int, ...], reference: DoubleArray, logits: FloatArray
) -> float:
    def worth(span: tuple[int, int]) -> float:
        if span == NOWHERE:
            return null_logit(reference[:, 0], reference[:, 1])
        return float(reference[span[0], 0] + reference[span[1], 1])

    return worth(_decided_span(task, places, reference)) - worth(_decided_span(task, places, logits))


def _decided_span(
    task: QuestionAnsweringTask, places: tuple[int, ...], logits: DoubleArray | FloatArray
) -> tuple[int, int]:
    starts, ends = logits[:, 0], logits[:, 1]
    span = best_span(starts, ends, (places[0], places[1]), task.max_answer_tokens)
    if span is None or (task.unanswerable and null_logit(starts, ends) > span.logit):
        return NOWHERE
    return span.first, span.last


def _reasons(report: TaskReport, tolerance: TaskTolerance) -> list[str]:
    reasons = []
    if report.max_logit_difference is None or not report.max_logit_difference <= tolerance.max_logit:
        reasons.append(f"a logit differs by {report.max_logit_difference}, allowed is {tolerance.max_logit}.")
    odd = report.decisions - report.decisions_equal
    share = 1 - tolerance.min_agreement
    allowed = max(1, math.floor(share * report.decisions + 1e-9)) if share else 0  # of few rows one may
    if odd > allowed:
        reasons.append(f"{odd} of {report.decisions} decisions differ, allowed are {allowed}.")
    return reasons
