"""How many rows of a step go through the model at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_kit.data.masking import Encoded

SMALLER = "smaller_micro_batches"  # in the manifest


@dataclass
class MicroBatches:
    """How many rows go through the model at once.

    Attributes:
        size: the recipe's number.
        smaller: (step, rows) where memory ran out: from that step on so many.
    """

    size: int
    smaller: list[tuple[int, int]] = field(default_factory=list)

    def at(self, step: int) -> int:
        """The rows of a micro batch in a step."""
        return next((rows for since, rows in reversed(self.smaller) if since <= step), self.size)

    def groups(self, rows: list[Encoded], step: int) -> list[list[Encoded]]:
        """A step's rows in micro batches."""
        size = self.at(step)
        return [rows[start : start + size] for start in range(0, len(rows), size)]
