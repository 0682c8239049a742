"""From a row's columns to an Example: the schema is detected from the first row, or named by the recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_kit.data.chat_rows import messages_row, sharegpt_row
from qlora_kit.data.examples import Conversation, Example, PlainText, PromptCompletion, RowError
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection, DataSource

REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "alpaca": ("input", "system"),
    "messages": ("tools",),
    "sharegpt": ("tools", "system"),
}
# Pairs read as prompt and completion where a row has these two columns and no other: a third column
# (Dolly's `context`, say) might belong into the prompt, which only the user can know.
ALIASES = (("question", "answer"), ("instruction", "response"))


class RowParser:
    """Turns the rows of one source into examples; the first row settles the schema for all.

    Args:
        section: names the schema (unless the source does) and renames columns.
        source: the file or hub id, for messages and its own schema.

    Attributes:
        schema: the settled schema, None before the first row.
        ignored_columns: columns that no example uses, in order of appearance.
    """

    def __init__(self, section: DataSection, source: DataSource) -> None:
        self.path = source.path
        self.schema: str | None = source.schema_ or section.schema_
        self.named = self.schema is not None
        self.columns = section.columns
        self.started = False
        self.alias: tuple[str, str] | None = None
        self.ignored_columns: dict[str, None] = {}

    def parse(self, number: int, row: dict[str, Any]) -> Example:
        """The example in a row.

        Raises:
            RowError: this row cannot be used.
            DataError: the first row shows no schema, or a later row shows another one.
        """
        if not self.started:
            self._settle(number, row)
            self.started = True
        named = self._renamed(row)
        assert self.schema is not None
        missing = [column for column in REQUIRED[self.schema] if named.get(column) is None]
        if missing:
            raise self._missing(number, row, named, missing)
        used = {*REQUIRED[self.schema], *OPTIONAL.get(self.schema, ())}
        for column in named:
            if column not in used:
                self.ignored_columns[column] = None
        return _BUILDERS[self.schema](named)

    def _settle(self, number: int, row: dict[str, Any]) -> None:
        place = f"{self.path} row {number}"
        for expected, actual in self.columns.items():
            if actual not in row and expected not in row:
                problem = f"no column {actual!r}, which data.columns names for {expected!r}"
                raise DataError(f"{place}: {problem}", **_there(row))
        if self.schema is None:
            self.schema, self.alias = _detect(self._renamed(row), place)
        named = self._renamed(row)
        missing = [column for column in REQUIRED[self.schema] if column not in named]
        if missing:
            raise self._missing(number, row, named, missing, first=True)

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        names = {actual: expected for expected, actual in self.columns.items() if actual in row}
        if self.alias:
            names |= {self.alias[0]: "prompt", self.alias[1]: "completion"}
        taken = set(names.values())
        return {names.get(key, key): value for key, value in row.items() if key in names or key not in taken}

    def _missing(
        self, number: int, row: dict[str, Any], named: dict[str, Any], missing: list[str], first: bool = False
    ) -> DataError:
        others = [name for name in _matching(named) if name != self.schema]
        if others and not first:
            return DataError(
                f"{self.path} row {number}: mixed schemas: this row is {others[0]}, the rows before are {self.schema}",
                fix="Put rows of one schema into one file; list several files under data.train",
            )
        problem = f"schema {self.schema} needs column {', '.join(repr(column) for column in missing)}"
        example = f"{{{missing[0]}: {next(iter(row), 'actual')}}}"
        fix = f"Rename with data.columns, for example {example}, or name another data.schema"
        if first:
            return DataError(f"{self.path} row {number}: {problem}", **(_there(row) | {"fix": fix}))
        return RowError(problem, reason=f"missing {missing[0]}", **(_there(row) | {"fix": fix}))


def _there(row: dict[str, Any]) -> dict[str, Any]:
    return {"got": list(row), "fix": "Correct data.columns: {expected: actual}"}


def _matching(row: dict[str, Any]) -> list[str]:
    return [name for name, columns in REQUIRED.items() if all(row.get(column) is not None for column in columns)]


def _detect(row: dict[str, Any], place: str) -> tuple[str, tuple[str, str] | None]:
    matches = _matching(row)
    if len(matches) == 1:
        return matches[0], None
    if matches:
        names = ", ".join(matches)
        raise DataError(f"{place}: columns fit several schemas: {names}", got=list(row), fix="Name data.schema")
    for alias in ALIASES:
        if set(row) == set(alias):
            return "prompt_completion", alias
    wanted = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in REQUIRED.items())
    raise DataError(
        f"{place}: no schema fits its columns",
        got=list(row),
        allowed=wanted,
        fix="Rename columns with data.columns, for example {prompt: question, completion: answer}",
    )


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"{column} is {type(value).__name__}, not text", reason=f"{column} not text", got=value)
    return value


def _filled(row: dict[str, Any], column: str, reason: str) -> str:
    text = _text(row, column)
    if not text.strip():
        raise RowError(f"{column} is empty", reason=reason, fix="Fill it, or set data.bad_rows: skip")
    return text


def _text_row(row: dict[str, Any]) -> PlainText:
    return PlainText(_filled(row, "text", "empty text"))


def _prompt_completion_row(row: dict[str, Any]) -> PromptCompletion:
    completion, *also = _completions(row)
    return PromptCompletion(_filled(row, "prompt", "empty prompt"), completion, tuple(also))


def _completions(row: dict[str, Any]) -> list[str]:
    """One text, or a list of texts that are as good as each other; the first is the one to learn."""
    value = row["completion"]
    if not isinstance(value, list):
        return [_filled(row, "completion", "empty completion")]
    if not value:
        raise RowError("completion is an empty list", reason="empty completion", allowed="a text, or a list of texts")
    return [_filled({f"completion[{k}]": text}, f"completion[{k}]", "empty completion") for k, text in enumerate(value)]


def _alpaca_row(row: dict[str, Any]) -> Conversation:
    parts = [_filled(row, "instruction", "empty prompt")]
    if row.get("input") is not None and _text(row, "input").strip():
        parts.append(row["input"])
    turns = [{"role": "user", "content": "\n\n".join(parts)}]
    if row.get("system") is not None and _text(row, "system").strip():
        turns.insert(0, {"role": "system", "content": row["system"]})
    return Conversation((*turns, {"role": "assistant", "content": _filled(row, "output", "empty completion")}))


_BUILDERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "text": _text_row,
    "prompt_completion": _prompt_completion_row,
    "alpaca": _alpaca_row,
    "messages": messages_row,
    "sharegpt": sharegpt_row,
}
