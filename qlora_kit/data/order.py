"""The order in which rows are seen: a pure function of seed and position, so that a resume needs no replay."""

from __future__ import annotations

from typing import Any

import numpy as np

from qlora_kit.errors import DataError


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """int64 [n]: the order of the rows in an epoch, a permutation that depends on its arguments alone."""
    return np.random.default_rng([seed, epoch, 0x6F7264]).permutation(n)


class BatchCursor:
    """Deals rows in micro batches, epoch after epoch, without end.

    The rows of all epochs form one sequence; a global micro batch is the next `micro_batch_size * world_size`
    of it, and may begin in one epoch and end in the next. A process takes its slice of it. All that is
    remembered is how many rows have been dealt, so micro batch size and process count may change on resume.

    Args:
        n: rows of an epoch.
        micro_batch_size: rows of one process.
        seed: the run's seed.
        state: from `state_dict`, to go on from there.
        world_size: processes.
        rank: this process.

    Raises:
        DataError: there is no row, or the state belongs to other data or another seed.
    """

    def __init__(
        self,
        n: int,
        micro_batch_size: int,
        seed: int,
        state: dict[str, Any] | None = None,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        if n < 1:
            raise DataError("no rows to make batches of", got=n)
        if not 0 <= rank < world_size:
            raise DataError("rank outside of the process count", got=rank, allowed=f"0 to {world_size - 1}")
        self.n, self.micro_batch_size, self.seed = n, micro_batch_size, seed
        self.world_size, self.rank = world_size, rank
        self.rows_dealt = 0
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        if state is not None:
            self.load_state_dict(state)

    @property
    def epoch(self) -> float:
        """Epochs dealt so far, with the fraction of the current one."""
        return self.rows_dealt / self.n

    def next_batch(self) -> list[int]:
        """This process's row indexes of the next global micro batch."""
        first = self.rows_dealt + self.rank * self.micro_batch_size
        batch = [self._row(first + k) for k in range(self.micro_batch_size)]
        self.rows_dealt += self.micro_batch_size * self.world_size
        return batch

    def __iter__(self) -> BatchCursor:
        return self

    def __next__(self) -> list[int]:
        return self.next_batch()

    def state_dict(self) -> dict[str, int]:
        """The position, as plain numbers for JSON."""
        return {"rows_dealt": self.rows_dealt, "rows": self.n, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position.

        Raises:
            DataError: the state counts other rows or has another seed.
        """
        for key, own in (("rows", self.n), ("seed", self.seed)):
            if state.get(key) != own:
                raise DataError(
                    f"the saved data position has {key} {state.get(key)}, this run has {own}",
                    fix="Resume with the data and seed that the run began with",
                )
        self.rows_dealt = int(state["rows_dealt"])

    def _row(self, position: int) -> int:
        epoch, within = divmod(position, self.n)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.n))
        return int(self._order[1][within])
