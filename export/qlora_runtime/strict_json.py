"""Reading JSON strictly: no unknown keys, no missing keys, no duplicate keys, no value of another type."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_runtime.errors import FormatError, MissingFileError

JsonObject = dict[str, Any]


def load_object(path: Path) -> JsonObject:
    """The JSON object in `path`.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is not UTF-8 JSON, not an object, repeats a key, or holds NaN or Infinity.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"{path} is missing. A bundle must have it: copy or export it again."
        ) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text ({error}). Copy or export the bundle again.") from error
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}. Copy or export the bundle again.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, a JSON object is expected.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """One JSON object, read field by field; `where` names it in messages, such as 'manifest.json: model'."""

    def __init__(self, value: Any, where: str, known: set[str]) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is {value!r}, an object with {sorted(known)} is expected.")
        if unknown := sorted(set(value) - known):
            raise FormatError(f"{where} has unknown fields {unknown}; known are {sorted(known)}.")
        self._value = value
        self._where = where

    def take(self, key: str, expected: str, accept: Callable[[Any], bool]) -> Any:
        """The field's value, if `accept` agrees; else a FormatError that says what was expected."""
        if key not in self._value:
            raise FormatError(f"{self._where} lacks the field {key!r} ({expected}).")
        value = self._value[key]
        if not accept(value):
            raise FormatError(f"{self._where}: {key} is {_shorten(value)}, expected {expected}.")
        return value

    def text(self, key: str) -> str:
        return str(self.take(key, "a non-empty string", lambda value: isinstance(value, str) and value != ""))

    def count(self, key: str) -> int:
        return int(self.take(key, "an integer of at least 0", is_count))

    def number(self, key: str) -> float:
        return float(self.take(key, "a number of at least 0", lambda value: is_number(value) and value >= 0))

    def object(self, key: str) -> JsonObject:
        return dict(self.take(key, "an object", lambda value: isinstance(value, dict)))


def is_count(value: Any) -> bool:
    """An integer of at least 0; JSON's true and false are no integers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """An integer or a float; JSON's true and false are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list_of(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for lists whose every item passes `accept`."""
    return lambda value: isinstance(value, list) and all(map(accept, value))


def dump(value: Mapping[str, Any]) -> bytes:
    """Readable UTF-8 JSON, with keys in the order given and a newline at the end.

    Raises:
        FormatError: a value is no JSON value, such as NaN or an object of another type.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"a value cannot be written as JSON: {error}. Give plain, finite values."
        ) from error


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
