"""Rows of different length into one rectangle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.errors import DataError


def collate(rows: Sequence[Encoded], pad_id: int, multiple_of: int = 8) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest, rounded up to `multiple_of`.

    Args:
        rows: at least one.
        pad_id: written into `input_ids` where `attention_mask` is 0; its labels are -100 whatever the id.
        multiple_of: tensor cores like lengths that are multiples of 8.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 [batch, seq].

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("a batch needs at least one row")
    longest = max(len(row.input_ids) for row in rows)
    seq = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(rows), seq), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), seq), dtype=torch.int64)
    labels = torch.full((len(rows), seq), IGNORED, dtype=torch.int64)
    for k, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[k, :length] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask[k, :length] = 1
        labels[k, :length] = torch.tensor(row.labels, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
