"""The rows on which bundles are proven, and those on which int8's ranges are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data.dataset import PreparedData
from qlora_kit.data.encoded_rows import EncodedRows
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.errors import ExportError
from qlora_kit.export.reference import Origin, Question, ReferenceRow, reference_answers
from qlora_kit.model.quantized import expanded

CALIBRATION_ROWS = 16
MIN_ROWS, MIN_POSITIONS = 2, 32
"""Fewer rows or tokens prove nothing: at 90% top-1 agreement, 32 positions may hold three wrong ones."""

ProofRow = tuple[Encoded, Origin]


def calibration_rows(data: PreparedData) -> list[list[int]]:
    """Rows to measure ranges on: of the training data, never a held-out one. A stream has none."""
    return [data.train[place].input_ids.tolist() for place in _calibration_places(data.train)]


def proof_rows(data: PreparedData, prompts: int) -> list[ProofRow]:
    """`prompts` rows, short and long ones: held out; then, where those are too few, of training.

    Training rows come once each, and those that int8's ranges are measured on come last.

    Raises:
        ExportError: too few rows or tokens to prove a bundle on.
    """
    chosen: list[ProofRow] = [(row, "held_out") for row in _spread(data.eval, prompts)]
    calibration = _calibration_places(data.train)
    contents = data.train.contents()
    seen = set(data.eval.contents().tolist())
    calibrated = _unseen(contents, calibration, seen)
    others = _unseen(contents, range(len(contents)), seen | {int(contents[place]) for place in calibration})
    kinds: tuple[tuple[list[int], Origin], ...] = ((others, "training"), (calibrated, "calibration"))
    for places, origin in kinds:
        rows = data.train.take(np.array(places, dtype=np.int64))
        chosen += [(row, origin) for row in _spread(rows, prompts - len(chosen))]
    _require_enough(chosen)
    return chosen


def reference_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ProofRow], scratch: Path
) -> list[ReferenceRow]:
    """The trained model's own answers to the rows on which bundles are proven; their logits lie in `scratch`.

    Raises:
        ExportError: `scratch` cannot be written.
    """
    questions = [
        Question(row.input_ids.tolist(), row.labels.tolist(), _prompt_tokens(row), origin) for row, origin in rows
    ]
    try:
        scratch.mkdir(exist_ok=True)
        with expanded(model, model.dtype):
            return reference_answers(model, tokenizer, questions, scratch)
    except OSError as error:
        raise ExportError(
            f"the trained model's logits cannot be kept in {scratch}: {error.strerror}",
            fix="Free some space, or lower export.verify_prompts",
        ) from error


def _calibration_places(train: EncodedRows) -> list[int]:
    count = min(CALIBRATION_ROWS, len(train))
    return [k * len(train) // count for k in range(count)]


def _unseen(contents: np.ndarray, places: Iterable[int], seen: set[int]) -> list[int]:
    """The places whose content is not in `seen`, the first of equal ones."""
    first: dict[int, int] = {}
    for place in places:
        if (content := int(contents[place])) not in seen:
            first.setdefault(content, place)
    return list(first.values())


def _spread(rows: EncodedRows, count: int) -> list[Encoded]:
    """Up to `count` of the rows, evenly over their lengths."""
    count = min(count, len(rows))
    order = np.argsort(rows.lengths(), kind="stable")
    return [rows[order[k * (len(order) - 1) // max(1, count - 1)]] for k in range(count)]


def _require_enough(rows: list[ProofRow]) -> None:
    positions = sum(len(row.input_ids) for row, _ in rows)
    if len(rows) < MIN_ROWS or positions < MIN_POSITIONS:
        raise ExportError(
            "too little to prove a bundle on",
            got=f"{len(rows)} rows with {positions} tokens",
            allowed=f"at least {MIN_ROWS} rows with {MIN_POSITIONS} tokens in all",
            fix="Put more or longer rows into data.eval",
        )


def _prompt_tokens(row: Encoded) -> int:
    """Tokens before the first that carries loss; of a row that is all loss, half."""
    first = int((row.labels != IGNORED).argmax())
    return first if first > 1 else max(1, len(row.input_ids) // 2)
