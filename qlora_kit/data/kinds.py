"""What a kind of rows is: how a row becomes an example, and an example tokens. Language modelling's is here."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from qlora_kit.data.examples import AnyExample
from qlora_kit.data.masking import Encoded, encode
from qlora_kit.data.schemas import RowParser
from qlora_kit.recipe import DataSection, DataSource


class Parser(Protocol):
    """Turns the rows of one source into examples; keeps the schema it settled on, and the columns it had no use for."""

    schema: str | None
    ignored_columns: dict[str, None]

    def parse(self, number: int, row: dict[str, Any]) -> AnyExample: ...


class RowKind(Protocol):
    """How the rows of a task are read and encoded."""

    own_labels: ClassVar[bool]
    """Labels are no ids of the row itself."""
    has_labels: ClassVar[bool]
    """Rows have labels from a list, whose shares a split keeps."""

    def parser(self, section: DataSection, source: DataSource) -> Parser:
        """The parser of one source."""
        ...

    def encode(self, example: Any, tokenizer: Any, section: DataSection) -> list[Encoded]:
        """The example as the model sees it: one row, or windows over one that is too long.

        Raises:
            RowError: it cannot be used.
        """
        ...

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        """A row for people to read: its text or file, and what is to be said of it."""
        ...


class LanguageRows:
    """Rows of causal language modelling."""

    own_labels: ClassVar[bool] = False
    has_labels: ClassVar[bool] = False

    def parser(self, section: DataSection, source: DataSource) -> Parser:
        return RowParser(section, source)

    def encode(self, example: Any, tokenizer: Any, section: DataSection) -> list[Encoded]:
        return [encode(example, tokenizer, section)]

    def shown(self, row: Encoded, tokenizer: Any) -> str:
        """All of the text: `show.loss_text` marks what of it carries loss."""
        return str(tokenizer.decode(row.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


LANGUAGE = LanguageRows()
