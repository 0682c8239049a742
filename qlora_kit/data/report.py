"""What became of every row that was read: the counts that a run reports and saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import Encoded

EXAMPLES_SHOWN = 3


@dataclass
class SourceReport:
    """Counts of one source. `read` = `used` + `held_out` + the sum of `skipped`.

    Of rows that are read in windows, as long contexts of questions are, all but `read` and `skipped` count the windows.
    """

    path: str
    fingerprint: str = ""
    schema: str | None = None
    read: int = 0
    used: int = 0
    """Rows that can be trained on (of an eval source: evaluated)."""
    held_out: int = 0
    """Rows set aside by data.eval_fraction."""
    drawn: int = 0
    """Rows of one epoch; differs from `used` only where sources are weighted."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason to count."""
    skipped_examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the first few errors, each naming file and row."""
    truncated: int = 0
    silent_turns: int = 0
    """Assistant turns of usable rows without loss, because the template rewrites earlier turns."""
    rows_with_control_tokens: int = 0
    """Chat rows whose own text spells a special token of the tokenizer; first few below."""
    control_token_examples: list[str] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)
    tokens: int = 0
    """Tokens of the used rows."""
    loss_tokens: int = 0
    longest: int = 0
    """Tokens of the longest used row."""

    def skip(self, error: RowError) -> None:
        """Counts a row that was left out; `error` names file and row."""
        self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        shown = self.skipped_examples.setdefault(error.reason, [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append(str(error))

    def use(self, row: Encoded) -> None:
        """Counts a row that is used."""
        self.used += 1
        self.truncated += row.truncated
        self.tokens += len(row.input_ids)
        self.loss_tokens += row.loss_tokens
        self.longest = max(self.longest, len(row.input_ids))

    def note_control_tokens(self, place: str) -> None:
        """Counts a row whose text spells special tokens."""
        self.rows_with_control_tokens += 1
        if len(self.control_token_examples) < EXAMPLES_SHOWN:
            self.control_token_examples.append(place)

    def counts(self) -> dict[str, Any]:
        """All that has been counted, without the examples: small enough for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int) or name == "skipped"}

    def restore(self, counts: dict[str, Any]) -> None:
        """Goes on counting from saved `counts`."""
        for name, value in counts.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)


@dataclass
class DataReport:
    """Counts of all sources of a run."""

    train: list[SourceReport]
    eval: SourceReport | None = None
    """The eval file; None where rows were held out of the training sources."""
    eval_rows: int = 0
    overlap: int = 0
    """Eval rows whose whole content is also trained on."""
    overlap_examples: list[str] = field(default_factory=list)
    doubtful_labels: list[str] = field(default_factory=list)
    """Sentences on labels of training rows that may be slips of the pen."""
    template: str | None = None
    """The chat template used."""

    def path_of(self, source: int) -> str:
        """The path of a source index; the eval file comes after the training sources."""
        return [*self.train, *([self.eval] if self.eval else [])][source].path

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def fingerprints(self) -> dict[str, str]:
        """Path to fingerprint of every source: a resumed run must find the same."""
        sources = [*self.train, *([self.eval] if self.eval else [])]
        return {source.path: source.fingerprint for source in sources}

    def left_out(self) -> dict[str, dict[str, int]]:
        """Path to reason to rows that could not be evaluated: of the eval file, or of what rows were held out of."""
        sources = [self.eval] if self.eval else self.train
        return {source.path: dict(source.skipped) for source in sources if source.skipped}

    def warnings(self) -> list[str]:
        """Sentences for the user: rows left out, cut or shared, each with its count."""
        lines = []
        for source in [*self.train, *([self.eval] if self.eval else [])]:
            lines += [f"{source.path}: {n} rows left out ({why})" for why, n in source.skipped.items()]
            silent, special = source.silent_turns, source.rows_with_control_tokens
            notes = {
                f"{source.truncated} rows cut to data.max_seq_len": source.truncated,
                f"{silent} earlier assistant turns without loss (the template rewrites them)": silent,
                f"{special} rows spell special tokens in their text": special,
                f"columns not used: {', '.join(source.ignored_columns)}": source.ignored_columns,
            }
            lines += [f"{source.path}: {text}" for text, there in notes.items() if there]
            if 0 < source.drawn < source.used:
                lines.append(f"{source.path}: {source.used - source.drawn} rows not drawn because of its weight")
        if self.template and "strftime_now" in self.template:
            lines.append("the chat template writes today's date: the same rows give other tokens tomorrow")
        if self.overlap:
            lines.append(f"{self.overlap} eval rows are also trained on: {', '.join(self.overlap_examples)}")
        return lines + self.doubtful_labels
