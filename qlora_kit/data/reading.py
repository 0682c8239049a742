"""One source's rows, parsed, encoded and counted: the only place where a row is used, skipped or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qlora_kit.data.examples import Conversation, PromptCompletion, RowError
from qlora_kit.data.kinds import LANGUAGE, RowKind
from qlora_kit.data.masking import Encoded
from qlora_kit.data.report import SourceReport
from qlora_kit.data.sources import RawRow, fingerprint, read_rows
from qlora_kit.recipe import DataSection, DataSource


class SourceEncoder:
    """Encodes the rows of one source and keeps its counts.

    Args:
        index: index of the source in the report, kept in every Encoded.
        source: where the rows come from.
        section: the recipe's data section.
        tokenizer: with its chat template resolved; a processor of images or sound for the tasks that have one.
        report: to count in; a new one, with the source's fingerprint, when left out.
        kind: how rows are read and encoded.
    """

    def __init__(
        self,
        index: int,
        source: DataSource,
        section: DataSection,
        tokenizer: Any,
        report: SourceReport | None = None,
        kind: RowKind = LANGUAGE,
    ) -> None:
        self.index, self.source, self.section, self.tokenizer = index, source, section, tokenizer
        self.kind, self.parser = kind, kind.parser(section, source)
        self.report = report or SourceReport(source.path, fingerprint(source, streaming=section.streaming))
        special = [token for token in getattr(tokenizer, "all_special_tokens", []) if token.strip()]
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def __call__(self, raw: RawRow) -> list[tuple[Encoded, Any]]:
        """The encoded row, or its windows where it is longer than the model reads at once; none where it was skipped
        and counted.

        Raises:
            DataError: the row cannot be used, and the recipe says to stop there; names file and row.
        """
        place = f"{self.source.path} row {raw.number}"
        self.report.read += 1
        try:
            if isinstance(raw.value, RowError):
                raise raw.value
            example = self.parser.parse(raw.number, raw.value)
            self.report.schema = self.parser.schema
            rows = self.kind.encode(example, self.tokenizer, self.section)
        except RowError as error:
            located = error.at(place)
            allowed = self.section.overlong if error.reason == "overlong" else self.section.bad_rows
            if allowed == "error":
                raise located from None
            self.report.skip(located)
            return []
        self.report.silent_turns += sum(row.silent_turns for row in rows)
        self.report.ignored_columns = list(self.parser.ignored_columns)
        if self._spells_special(example):
            self.report.note_control_tokens(place)
        return [(replace(row, source=self.index, row=raw.number), example) for row in rows]

    def rows(self) -> Iterator[tuple[Encoded, Any]]:
        """All usable rows in order; `report.use` is left to the caller, who knows what a row is used for.

        Raises:
            DataError: see `__call__`, and for a source that cannot be read.
        """
        for raw in read_rows(self.source, streaming=self.section.streaming):
            yield from self(raw)

    def _spells_special(self, example: Any) -> bool:
        if self._special is None or not isinstance(example, PromptCompletion | Conversation):
            return False  # plain text may be formatted on purpose
        chat = example if isinstance(example, Conversation) else example.as_conversation()
        return any(self._special.search(message.get("content") or "") for message in chat.messages)


def eval_source(section: DataSection) -> DataSource | None:
    """The eval file as a source; None where rows are held out of the training sources."""
    if section.eval is None:
        return None
    return DataSource.model_validate({"path": section.eval, "schema": section.schema_})
