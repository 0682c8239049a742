"""One form of a model for a task, asked for losses and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.collate import on_device
from qlora_kit.errors import EvalError
from qlora_kit.eval.scorers import by_length
from qlora_kit.eval.task_answers import AnswerReader, Piece, TaskAnswer
from qlora_kit.eval.task_rows import TaskRow
from qlora_kit.model.quantized import expanded
from qlora_kit.tasks.images import in_model_dtype
from qlora_kit.tasks.task import Batch, Task, without_labels


@dataclass(frozen=True)
class ScoredRow:
    """What a form made of one labelled row."""

    loss: float
    """Summed over what is counted."""
    counted: int
    answer: TaskAnswer


class TaskForm:
    """One form of the model.

    Args:
        model: takes a batch by its names, and gives what transformers' model of the task gives.
        batch_size: windows of one forward pass, of similar length.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task[Any],
        tokenizer: PreTrainedTokenizerBase,
        reader: AnswerReader,
        batch_size: int,
    ) -> None:
        self.model, self.task, self.tokenizer, self.reader = model.eval(), task, tokenizer, reader
        self.batch_size = batch_size
        self.device = next((weight.device for weight in model.parameters()), torch.device("cpu"))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Weights stay expanded inside the block."""
        with expanded(self.model, getattr(self.model, "dtype", torch.float32)):
            yield

    def score(self, rows: Sequence[TaskRow]) -> list[ScoredRow]:
        """Losses and answers of labelled rows."""
        totals, pieces = [(0.0, 0)] * len(rows), self._pieces(rows)
        for places, batch in self._batches(rows):
            with kept_outputs(self.model) as outputs:
                sums, counted = self.task.row_losses(self.model, batch)
            self._keep(pieces, rows, places, self._read(batch, outputs[0]))
            for (row, _), loss, count in zip(places, sums.tolist(), counted.tolist()):
                totals[row] = totals[row][0] + loss, totals[row][1] + count
        answers = self._answers(rows, pieces)
        return [ScoredRow(loss, count, answer) for (loss, count), answer in zip(totals, answers)]

    @torch.no_grad()
    def answers(self, rows: Sequence[TaskRow]) -> list[TaskAnswer]:
        """Answers to rows, labelled or not."""
        pieces = self._pieces(rows)
        for places, batch in self._batches(rows):
            self._keep(pieces, rows, places, self._read(batch))
        return self._answers(rows, pieces)

    def _read(self, batch: Batch, output: Any = None) -> Any:
        """What answers are made of: the output of one forward pass, which may have been made already."""
        if output is not None:
            return output
        return self.model(**in_model_dtype(self.model, without_labels(batch)))

    def _batches(self, rows: Sequence[TaskRow]) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
        """(row and window of each place of the batch, the batch)."""
        windows = [(k, w) for k, row in enumerate(rows) for w in range(len(row.windows))]
        encoded = [rows[k].windows[w] for k, w in windows]
        for places in by_length(encoded, self.batch_size):
            batch = self.task.collate([encoded[place] for place in places], self.tokenizer)
            yield [windows[place] for place in places], on_device(batch, self.device)

    def _pieces(self, rows: Sequence[TaskRow]) -> list[dict[int, Piece]]:
        return [{} for _ in rows]

    def _keep(
        self, pieces: list[dict[int, Piece]], rows: Sequence[TaskRow], places: list[tuple[int, int]], output: Any
    ) -> None:
        for at, (row, window) in enumerate(places):
            piece = self.reader.piece(output, at, rows[row].windows[window])
            if not np.isfinite(piece).all():
                raise EvalError(f"{rows[row].place}: what the model gives is not finite", fix="Train with a lower lr")
            pieces[row][window] = piece

    def _answers(self, rows: Sequence[TaskRow], pieces: list[dict[int, Piece]]) -> list[TaskAnswer]:
        return [
            self.reader.answer(row.example, row.windows, [found[w] for w in range(len(row.windows))])
            for row, found in zip(rows, pieces)
        ]


@contextmanager
def kept_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """What the model gives inside the block, so that a loss and its answers need one forward pass."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
