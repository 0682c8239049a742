"""The ONNX graph of a task: reads whole rows at once, run by onnxruntime on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qlora_runtime.errors import ModelLoadError, ModelOutputError
from qlora_runtime.session import open_session

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

TYPES = "token_type_ids"


class TokenRow(Protocol):
    """A row as the model sees it: int64 [seq] each, special tokens included, without padding."""

    @property
    def input_ids(self) -> Int64Array: ...

    @property
    def type_ids(self) -> Int64Array: ...


class Encoder:
    """A loaded graph."""

    def __init__(self, graph: Path, outputs: tuple[str, ...], pad_id: int, threads: int | None) -> None:
        """Load `graph`, which must give `outputs`: logits, or start_logits and end_logits.

        Raises:
            ModelLoadError: onnxruntime refuses the file, or its inputs and outputs are not the format's.
        """
        self._session = open_session(graph, threads)
        self._outputs, self._pad_id = outputs, pad_id
        inputs = {value.name for value in self._session.get_inputs()}
        found = {value.name for value in self._session.get_outputs()}
        if odd := sorted((inputs - {TYPES}) ^ {"input_ids", "attention_mask"} | found ^ set(outputs)):
            raise ModelLoadError(
                f"the graph and the format disagree on these inputs or outputs: {odd}. Allowed are "
                f"input_ids, attention_mask, {TYPES} and {', '.join(outputs)}. Export again."
            )
        self._has_types = TYPES in inputs

    def run(self, rows: Sequence[TokenRow]) -> list[FloatArray]:
        """One forward over rows that are padded on the right to the longest.

        Returns: of each row float32 [seq, labels] (of question answering [seq, start and end]), or
            [1, labels] where the whole row has one answer.

        Raises:
            ModelOutputError: a logit is not finite.
        """
        lengths = [len(row.input_ids) for row in rows]
        feeds = {
            "input_ids": _padded([row.input_ids for row in rows], self._pad_id),
            "attention_mask": _padded([np.ones_like(row.input_ids) for row in rows], 0),
        }
        if self._has_types:
            feeds[TYPES] = _padded([row.type_ids for row in rows], 0)
        outputs = [np.asarray(value, dtype=np.float32) for value in self._session.run(self._outputs, feeds)]
        if len(outputs) > 1:
            logits = np.stack(outputs, axis=-1)  # [batch, seq, 2]
        else:
            logits = outputs[0] if outputs[0].ndim == 3 else outputs[0][:, None]
        found = [row[:length] for row, length in zip(logits, lengths, strict=True)]
        if not all(np.isfinite(row).all() for row in found):
            raise ModelOutputError("the model answered with NaN or infinite logits. Verify the bundle.")
        return found


def _padded(rows: Sequence[Int64Array], fill: int) -> Int64Array:
    """int64 [batch, seq]."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out
