"""The training loop's supply of micro batches, whether the rows are in memory or streamed."""

from __future__ import annotations

from typing import Any

from qlora_kit.data.dataset import PreparedData
from qlora_kit.data.masking import Encoded
from qlora_kit.data.order import BatchCursor
from qlora_kit.data.stream import StreamedTrain
from qlora_kit.recipe import DataSection


class TrainBatches:
    """Micro batches without end, from a position that a checkpoint can save and restore exactly.

    Args:
        data: from `prepare`.
        section: the recipe's data section.
        tokenizer: with its chat template resolved.
        micro_batch_size: rows of one process.
        seed: the run's seed.
        rank: this process.
        world_size: processes; each takes its slice of every global micro batch.

    Raises:
        DataError: there is nothing to train on.
    """

    def __init__(
        self,
        data: PreparedData,
        section: DataSection,
        tokenizer: Any,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self._rows = data.train
        self._stream = StreamedTrain(section, tokenizer, seed, data.report.train) if section.streaming else None
        self._cursor = None
        if self._stream is None:
            self._cursor = BatchCursor(len(data.train), micro_batch_size, seed, world_size=world_size, rank=rank)

    def next_micro_batch(self) -> list[Encoded]:
        """This process's next `micro_batch_size` rows."""
        if self._cursor is not None:
            return [self._rows[k] for k in self._cursor.next_batch()]
        assert self._stream is not None
        # Every process reads the whole stream: whether a row is usable, and so the position, is then the
        # same on all of them.
        whole = [next(self._stream) for _ in range(self.micro_batch_size * self.world_size)]
        return whole[self.rank * self.micro_batch_size : (self.rank + 1) * self.micro_batch_size]

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain data for JSON; the same on every process."""
        return self._cursor.state_dict() if self._cursor is not None else self._streamed().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position.

        Raises:
            DataError: it belongs to other data or another seed.
        """
        if self._cursor is not None:
            self._cursor.load_state_dict(state)
        else:
            self._streamed().load_state_dict(state)

    def _streamed(self) -> StreamedTrain:
        assert self._stream is not None
        return self._stream
