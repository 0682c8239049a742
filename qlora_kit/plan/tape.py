"""What is alive when: a training step played through in bytes, so that its peak is found and not guessed."""

from __future__ import annotations

from collections import Counter


class Tape:
    """Sums what is taken and given back, and keeps the moment at which most was held.

    Attributes:
        held: part to bytes, now.
        peak: part to bytes, at the moment of the largest sum.
    """

    def __init__(self, held: dict[str, int] | None = None) -> None:
        self.held: Counter[str] = Counter(held or {})
        self.peak: dict[str, int] = dict(self.held)
        self._now = self._highest = sum(self.held.values())

    @property
    def peak_bytes(self) -> int:
        return self._highest

    def take(self, part: str, size: float) -> None:
        """Something of `size` bytes is made."""
        self.held[part] += int(size)
        self._now += int(size)
        if self._now > self._highest:
            self._highest, self.peak = self._now, {name: held for name, held in self.held.items() if held}

    def give(self, part: str, size: float) -> None:
        """Something of `size` bytes is freed."""
        self.held[part] -= int(size)
        self._now -= int(size)

    def brief(self, part: str, size: float) -> None:
        """Something is made and freed at once."""
        self.take(part, size)
        self.give(part, size)
