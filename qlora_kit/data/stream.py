"""Training rows read as training goes, from a position that can be restored exactly.

Rows are shuffled before they are encoded, and every random choice depends on the seed, the epoch and the
number of rows read, never on what a row holds. So a position is two numbers, and going back to it means
reading that many raw rows of the epoch again, without tokenizing any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_kit.data.masking import Encoded
from qlora_kit.data.mixing import shares
from qlora_kit.data.reading import SourceEncoder
from qlora_kit.data.report import SourceReport
from qlora_kit.data.sources import RawRow, read_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection

Drawn = tuple[int, RawRow]  # source index, row


class StreamedTrain:
    """Encoded training rows without end, shuffled through a buffer of `data.shuffle_buffer` rows.

    Without weights an epoch reads each source once, one after the other through the one buffer, which is
    emptied at the epoch's end. With weights each row comes from a source drawn by its share, a source that is
    read to its end begins again, and everything is one long epoch 0.

    Args:
        section: the recipe's data section.
        tokenizer: with its chat template resolved.
        seed: the run's seed.
        reports: one for each source, to count in; made here when left out.

    Raises:
        DataError: a source cannot be read.
    """

    def __init__(
        self, section: DataSection, tokenizer: Any, seed: int, reports: list[SourceReport] | None = None
    ) -> None:
        self.section, self.seed = section, seed
        self.sources = section.sources()
        self.shares = shares(self.sources)
        self.encoders = [
            SourceEncoder(k, source, section, tokenizer, reports[k] if reports else None)
            for k, source in enumerate(self.sources)
        ]
        self.epoch, self.draws = 0, 0
        self._usable_in_epoch = False
        self._stream = self._shuffled()

    @classmethod
    def from_state(cls, section: DataSection, tokenizer: Any, state: dict[str, Any]) -> StreamedTrain:
        """A stream whose next row is the one that the saved stream would have given next."""
        stream = cls(section, tokenizer, int(state["seed"]))
        stream.load_state_dict(state)
        return stream

    def __iter__(self) -> StreamedTrain:
        return self

    def __next__(self) -> Encoded:
        """The next usable row.

        Raises:
            DataError: a row cannot be used (see `data.bad_rows`), or a whole epoch held none that can.
        """
        while True:
            drawn = next(self._stream, None)
            if drawn is None:
                self._next_epoch()
                continue
            self.draws += 1
            source, raw = drawn
            for row, _ in self.encoders[source](raw):  # of language modelling: one, or none
                self._usable_in_epoch = True
                self.encoders[source].report.use(row)
                return row

    def state_dict(self) -> dict[str, Any]:
        """The position and the counts so far, as plain data for JSON."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "draws": self.draws,
            "usable": self._usable_in_epoch,
            "counts": [encoder.report.counts() for encoder in self.encoders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position by reading the epoch's rows again up to it.

        Raises:
            DataError: the state has another seed or other sources, or its rows are no longer there.
        """
        if state.get("seed") != self.seed or len(state.get("counts", [])) != len(self.encoders):
            raise DataError(
                f"the saved data position has seed {state.get('seed')} and {len(state.get('counts', []))} sources,"
                f" this run has seed {self.seed} and {len(self.encoders)}",
                fix="Resume with the data and seed that the run began with",
            )
        self.epoch, self.draws = int(state["epoch"]), int(state["draws"])
        self._usable_in_epoch = bool(state["usable"])
        for encoder, counts in zip(self.encoders, state["counts"]):
            encoder.report.restore(counts)
        self._stream = self._shuffled()
        for k in range(self.draws):
            if next(self._stream, None) is None:
                raise DataError(f"the data ended after {k} rows; the saved position is row {self.draws}")

    def _next_epoch(self) -> None:
        if not self._usable_in_epoch:
            counts = {encoder.source.path: encoder.report.skipped for encoder in self.encoders}
            raise DataError(f"no usable row in a whole epoch (skipped: {counts})", fix="See `qlora-kit data show`")
        self.epoch, self.draws, self._usable_in_epoch = self.epoch + 1, 0, False
        self._stream = self._shuffled()

    def _shuffled(self) -> Iterator[Drawn]:
        choose = np.random.default_rng([self.seed, self.epoch, 0x737472])
        size = self.section.shuffle_buffer
        buffer: list[Drawn] = []
        for row in self._in_order():
            if len(buffer) < size:
                buffer.append(row)
                continue
            place = int(choose.integers(size))
            yield buffer[place]
            buffer[place] = row
        for place in choose.permutation(len(buffer)):
            yield buffer[place]

    def _in_order(self) -> Iterator[Drawn]:
        if self.shares is None:
            for k in range(len(self.sources)):
                yield from self._rows_of(k)
            return
        pick = np.random.default_rng([self.seed, 0x77676874])
        running = [self._rows_of(k) for k in range(len(self.sources))]
        while True:
            k = int(pick.choice(len(running), p=self.shares))
            row = next(running[k], None)
            if row is None:  # read to its end: an empty source has raised by now
                running[k] = self._rows_of(k)
                row = next(running[k])
            yield row

    def _rows_of(self, k: int) -> Iterator[Drawn]:
        for raw in read_rows(self.sources[k], streaming=self.section.streaming):
            yield k, raw
