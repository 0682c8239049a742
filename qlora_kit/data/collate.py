"""Rows of different length into one rectangle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
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
    input_ids = padded([row.input_ids for row in rows], pad_id, multiple_of)
    attention_mask = padded([np.ones_like(row.input_ids) for row in rows], 0, multiple_of)
    labels = padded([row.labels for row in rows], IGNORED, multiple_of)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def padded(rows: Sequence[np.ndarray], fill: int, multiple_of: int = 8) -> torch.Tensor:
    """int64 [batch, seq]: rows of ints, filled up on the right to the longest, rounded up to `multiple_of`."""
    seq = -(-max(map(len, rows)) // multiple_of) * multiple_of
    out = torch.full((len(rows), seq), fill, dtype=torch.int64)
    for k, row in enumerate(rows):
        out[k, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch with its tensors on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
