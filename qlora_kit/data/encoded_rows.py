"""A compact store of encoded rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qlora_kit.data.masking import IGNORED, Encoded


class OwnLabels:
    """Labels of rows and where their second texts start, in flat arrays, and the paths of rows that are files."""

    def __init__(self) -> None:
        self._flat, self._ends, self.seconds = array("i"), array("q", [0]), array("i")
        self.files: list[str] = []

    def append(self, row: Encoded) -> None:
        self._flat.frombytes(np.ascontiguousarray(row.labels, dtype=np.int32).tobytes())
        self._ends.append(len(self._flat))
        self.seconds.append(row.second)
        self.files.append(row.file)

    def labels(self, at: int) -> np.ndarray:
        """int32 [labels] of the row at a place."""
        return np.frombuffer(self._flat, dtype=np.int32)[self._ends[at] : self._ends[at + 1]]


class EncodedRows(Sequence[Encoded]):
    """Encoded rows in flat arrays (5 bytes a token), seen through positions that may repeat rows.

    Args:
        own_labels: labels are no ids of the row itself, and are kept as they are.

    Attributes:
        positions: int64 [len], places in the store; a view made by `take` shares the store.
    """

    def __init__(self, own_labels: bool = False) -> None:
        self._own = OwnLabels() if own_labels else None
        self._ids, self._loss = array("i"), bytearray()
        self._ends, self._sources, self._rows = array("q", [0]), array("i"), array("q")
        self._hashes = array("Q")
        self._cut: set[int] = set()
        self.positions = np.zeros(0, dtype=np.int64)

    def append(self, row: Encoded, content: int) -> None:
        """Adds a row with the hash of its content."""
        if row.truncated:
            self._cut.add(len(self._rows))
        self._ids.frombytes(np.ascontiguousarray(row.input_ids, dtype=np.int32).tobytes())
        if self._own:
            self._own.append(row)
        else:
            self._loss += (row.labels != IGNORED).tobytes()
        self._ends.append(len(self._ids))
        self._sources.append(row.source)
        self._rows.append(row.row)
        self._hashes.append(content)

    def seal(self) -> EncodedRows:
        """Ends the appending: the positions cover every row once."""
        self.positions = np.arange(len(self._rows), dtype=np.int64)
        return self

    def take(self, which: np.ndarray) -> EncodedRows:
        """A view of this view's rows at `which` (int [n], repeats allowed)."""
        view = object.__new__(EncodedRows)
        view.__dict__ = {**self.__dict__, "positions": self.positions[which]}
        return view

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[k] for k in range(*position.indices(len(self)))]
        at = int(self.positions[position])
        start, end = self._ends[at], self._ends[at + 1]
        ids = np.frombuffer(self._ids, dtype=np.int32)[start:end]
        place = self._sources[at], self._rows[at], at in self._cut
        if self._own:
            own = self._own
            return Encoded(ids, own.labels(at), *place, second=own.seconds[at], file=own.files[at])
        loss = np.frombuffer(self._loss, dtype=bool)[start:end]
        return Encoded(ids, np.where(loss, ids, np.int32(IGNORED)), *place)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[k] for k in range(len(self)))

    def lengths(self) -> np.ndarray:
        """int64 [len]: tokens of each row."""
        return np.diff(np.array(self._ends, dtype=np.int64))[self.positions]

    def sources(self) -> np.ndarray:
        """int32 [len]: the source of each row."""
        return np.array(self._sources, dtype=np.int32)[self.positions]

    def contents(self) -> np.ndarray:
        """uint64 [len]: hash of each row's content."""
        return np.array(self._hashes, dtype=np.uint64)[self.positions]
