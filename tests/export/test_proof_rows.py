"""Which rows prove a bundle: held-out ones first, then training rows, those that were calibrated on last."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qlora_kit.data.dataset import PreparedData
from qlora_kit.data.encoded_rows import EncodedRows
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.report import DataReport
from qlora_kit.errors import ExportError
from qlora_kit.export.rows import CALIBRATION_ROWS, calibration_rows, proof_rows


def stored(contents: list[int], tokens: int = 20) -> EncodedRows:
    """A row for each content, which is its first token and its hash; longer as the content is larger."""
    rows = EncodedRows()
    for content in contents:
        ids = np.full(tokens + content % 7, content, dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < 9, np.int32(IGNORED), ids)
        rows.append(Encoded(ids, labels, 0, content, False), content)
    return rows.seal()


def data(train: list[int], held_out: list[int], tokens: int = 20) -> PreparedData:
    return PreparedData(stored(train), stored(held_out, tokens), DataReport([], template=None))


def chosen(prepared: PreparedData, prompts: int) -> dict[int, str]:
    """Row number: where it comes from. No row twice."""
    rows = proof_rows(prepared, prompts)
    assert len({row.row for row, _ in rows}) == len(rows)
    return {row.row: origin for row, origin in rows}


def test_enough_held_out_rows_need_no_others() -> None:
    found = chosen(data([*range(50)], [*range(100, 140)]), 16)
    assert len(found) == 16 and set(found.values()) == {"held_out"}


def test_the_rest_comes_from_training_rows_that_were_not_calibrated_on() -> None:
    prepared = data([*range(100)], [200, 201])
    calibrated = {row[0] for row in calibration_rows(prepared)}
    found = chosen(prepared, 12)
    assert Counter(found.values()) == {"held_out": 2, "training": 10} and len(calibrated) == CALIBRATION_ROWS
    assert not calibrated & found.keys()


def test_where_there_are_too_few_calibrated_ones_come_last() -> None:
    assert Counter(chosen(data([*range(20)], [200]), 16).values()) == {
        "held_out": 1,
        "training": 4,
        "calibration": 11,
    }
    assert Counter(chosen(data([1, 2, 3], [200]), 16).values()) == {"held_out": 1, "calibration": 3}


def test_a_row_drawn_twice_or_held_out_too_comes_once() -> None:
    found = chosen(data([1, 1, 1, 2, 200, 2, 2, *range(3, 19)], [200]), 16)
    assert found[200] == "held_out" and len(found) == 16
    assert chosen(data([5] * 40 + [200], [200]), 16) == {200: "held_out", 5: "calibration"}


@pytest.mark.parametrize(
    ("train", "prompts", "tokens", "got"),
    [([], 16, 90, "1 rows with 90 tokens"), ([1], 1, 90, "1 rows"), ([], 16, 4, "1 rows with")],
)
def test_too_little_proves_nothing(train: list[int], prompts: int, tokens: int, got: str) -> None:
    with pytest.raises(ExportError, match=rf"too little to prove a bundle on \(got '{got}.*at least 2 rows with 32"):
        proof_rows(data(train, [13 * 7], tokens), prompts)
