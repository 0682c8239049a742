"""From a model's outputs to a task's answers: labels, numbers, tags, and what a file of predictions says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_kit.data.masking import Encoded
from qlora_kit.tasks.task import Task

FloatArray = NDArray[np.float64]
Piece = NDArray[Any]
"""What is kept of a model's output for one window."""
DIGITS = 6
"""Of probabilities and numbers in files: what is left of float32 after another order of additions."""


@dataclass(frozen=True)
class TaskAnswer:
    """What a model answers to one row.

    Attributes:
        value: what is compared with the row's own answer: a label, labels, a number, tags or a text; plain data.
        columns: what a file of predictions says: column to cell, plain data.
    """

    value: Any
    columns: dict[str, Any]


class AnswerReader:
    """How one task's outputs are read.

    Args:
        task: with its labels.
    """

    columns: Sequence[str]
    """Of a file of predictions, in order."""

    def __init__(self, task: Task[Any]) -> None:
        self.task, self.labels = task, task.labels

    def blank(self, example: Any) -> Any:
        """The example with an answer that stands for none, so that a row without one can be encoded."""
        raise NotImplementedError

    def expected(self, example: Any) -> Any:
        """The row's own answer, as `TaskAnswer.value`."""
        raise NotImplementedError

    def piece(self, output: Any, at: int, row: Encoded) -> Piece:
        """What is kept of the model's output for the window at place `at` of its batch."""
        return np.asarray(output.logits[at].float().cpu().numpy(), dtype=np.float64)

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        """The answer to a row from the pieces of its windows."""
        raise NotImplementedError


class LabelReader(AnswerReader):
    """One label a row: the likeliest."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__(task)
        self.columns = ["predicted_label", "probability", *(f"probability_{label}" for label in self.labels)]

    def blank(self, example: Any) -> Any:
        return replace(example, label=self.labels[0])

    def expected(self, example: Any) -> str:
        return str(example.label)

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        probabilities = softmax(pieces[0])  # [labels]
        best = int(np.argmax(probabilities))
        cells = [self.labels[best], *rounded([probabilities[best], *probabilities])]
        return TaskAnswer(self.labels[best], dict(zip(self.columns, cells)))


class LabelsReader(AnswerReader):
    """Any number of labels a row: those with a probability above one half."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__(task)
        self.columns = ["predicted_labels", *(f"probability_{label}" for label in self.labels)]

    def blank(self, example: Any) -> Any:
        return replace(example, label=())

    def expected(self, example: Any) -> list[str]:
        return [label for label in self.labels if label in example.label]

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        chosen = [label for label, logit in zip(self.labels, pieces[0]) if logit > 0]
        probabilities = 1 / (1 + np.exp(-pieces[0]))  # [labels]
        return TaskAnswer(chosen, dict(zip(self.columns, [chosen, *rounded(probabilities)])))


class NumberReader(AnswerReader):
    """One number a row."""

    columns = ("predicted_value",)

    def blank(self, example: Any) -> Any:
        return replace(example, label=0.0)

    def expected(self, example: Any) -> float:
        return float(example.label)

    def answer(self, example: Any, windows: Sequence[Encoded], pieces: Sequence[Piece]) -> TaskAnswer:
        value = float(pieces[0][0])
        return TaskAnswer(value, {"predicted_value": rounded([value])[0]})


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def rounded(values: Sequence[float] | FloatArray) -> list[float]:
    """Plain numbers with `DIGITS` decimals."""
    return [round(float(value), DIGITS) for value in values]
