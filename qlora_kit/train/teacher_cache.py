"""What a teacher says of all training rows, asked once and kept in the run folder (`train.distill.top_k`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_kit.atomic import disk_error, sync
from qlora_kit.data.masking import Encoded
from qlora_kit.kernels.distill_loss import TeacherSays
from qlora_kit.train.distill import Collate, OnlineTeacher

ROWS_AT_ONCE = 8
PIECE = 1 << 16
"""Loss tokens that are looked at together."""
ENOUGH = 0.8
"""Share of the teacher's probability; with less, the loss sees less than three quarters of what it differs by."""


class CachedTeacher:
    """A teacher's `top_k` likeliest tokens at each loss token, read from a file row by row.

    Args:
        load: makes the teacher; called only where the file is not there yet.
        marks: what the file must be marked with to be this teacher's words on this data.

    The file holds log_probs float16 and ids int32 [loss tokens of all rows, k], and places int64 [rows, 4]: a row's
    source, its number there, and its first and last token + 1.
    """

    def __init__(
        self, path: Path, load: Callable[[], OnlineTeacher], top_k: int, marks: dict[str, str], device: torch.device
    ) -> None:
        self.path, self.load, self.top_k, self.marks, self.device = path, load, top_k, marks, device

    def prepare(self, rows: Sequence[Encoded], collate: Collate) -> str | None:
        """Asks the teacher, unless what it said to these rows is there already.

        Returns: a warning where what is kept holds little of its probability.
        """
        if not is_cached(self.path, self.marks):
            write_cache(self.path, self.load(), rows, collate, self.top_k, self.marks)
        self._file: Any = safe_open(self.path, framework="pt")
        places = self._file.get_tensor("places").tolist()
        self._places = {(source, row): slice(start, end) for source, row, start, end in places}
        share = self._kept_share()
        if share >= ENOUGH:
            return None
        return (
            f"the teacher's {self.top_k} likeliest tokens hold {share:.0%} of its probability, and the student learns "
            "little of the rest: lower train.distill.temperature, or raise top_k"
        )

    def _kept_share(self) -> float:
        """Of the teacher's probability, a mean over loss tokens; read in pieces, as the file may be large."""
        log_probs = self._file.get_slice("log_probs")
        tokens = log_probs.get_shape()[0]
        return sum(float(log_probs[k : k + PIECE].float().exp().sum()) for k in range(0, tokens, PIECE)) / tokens

    def says(self, batch: Mapping[str, Tensor], rows: list[Encoded]) -> Callable[[slice], TeacherSays]:
        spans = [self._places[row.source, row.row] for row in rows]
        log_probs = torch.cat([self._file.get_slice("log_probs")[span] for span in spans]).to(self.device).float()
        ids = torch.cat([self._file.get_slice("ids")[span] for span in spans]).to(self.device).long()
        return lambda place: TeacherSays(log_probs[place], ids[place])


def is_cached(path: Path, marks: dict[str, str]) -> bool:
    """Whether a whole cache of this teacher, data and settings (`marks`) lies at `path`."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.metadata() == marks)
    except (OSError, SafetensorError):
        return False


def write_cache(
    path: Path,
    teacher: OnlineTeacher,
    rows: Sequence[Encoded],
    collate: Collate,
    top_k: int,
    marks: dict[str, str],
) -> None:
    """Asks `teacher` for all rows and writes its `top_k` likeliest tokens to `path`, whole or not at all.

    Raises:
        RunError: the disk is full.
    """
    log_probs: list[Tensor] = []
    ids: list[Tensor] = []
    places: list[tuple[int, int, int, int]] = []
    start = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        group = [rows[k] for k in range(first, min(first + ROWS_AT_ONCE, len(rows)))]
        says = teacher.says(collate(group), group)
        begin = start
        for row in group:
            places.append((row.source, row.row, start, start + row.loss_tokens))
            start += row.loss_tokens
        found = says(slice(0, start - begin)).log_probs.topk(top_k, dim=1)
        log_probs.append(found.values.half().cpu())
        ids.append(found.indices.int().cpu())
    tensors = {"log_probs": torch.cat(log_probs), "ids": torch.cat(ids), "places": torch.tensor(places)}
    partial = path.with_name(f".partial-{path.name}")
    try:
        save_file(tensors, partial, metadata=marks)
        sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise disk_error(path, error if isinstance(error, OSError) else OSError(str(error))) from error
