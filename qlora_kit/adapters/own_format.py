"""adapter_config.json of the methods that PEFT does not have: the method's own fields of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.errors import AdapterError

S = TypeVar("S", bound=AdapterSettings)


def own_config(settings: AdapterSettings) -> dict[str, Any]:
    """The fields that a method has beside those of all methods, as plain data."""
    return settings.model_dump(include=_own_fields(type(settings)))


def read_own_config(kind: type[S], config: dict[str, Any], origin: Path, **more: Any) -> S:
    """The settings of class `kind` that `own_config` wrote, with `more` fields.

    Raises:
        AdapterError: a field is missing, or holds what it must not.
    """
    fields = _own_fields(kind)
    missing = sorted(fields - config.keys())
    if missing:
        raise AdapterError(f"{origin}: field '{missing[0]}' is missing", fix="Save the adapter again")
    try:
        return kind(**{name: config[name] for name in fields}, **more)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise AdapterError(f"{origin}: {name}: {first['msg'].lower()}", got=first["input"]) from None


def _own_fields(kind: type[AdapterSettings]) -> set[str]:
    return kind.model_fields.keys() - AdapterSettings.model_fields.keys()
