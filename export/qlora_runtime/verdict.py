"""What verifying any bundle ends in."""

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any


@dataclass
class Verdict:
    """What verifying found. It passed where `reasons` is empty; what else it holds are measured numbers."""

    reasons: list[str] = field(default_factory=list)  # why it failed, one sentence each

    @property
    def passed(self) -> bool:
        """True where nothing was found wrong."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """All fields, with `passed` first."""
        return {"passed": self.passed, "reasons": self.reasons} | self.distances()

    def distances(self) -> dict[str, Any]:
        """The measured numbers, as a manifest's `verification.distances` keeps them; null for NaN."""
        numbers = {key: value for key, value in asdict(self).items() if key != "reasons"}
        return {key: value if value is None or isfinite(value) else None for key, value in numbers.items()}
