"""What every section of a recipe is made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
SIZE = r"^[0-9]+(\.[0-9]+)?(GiB|MiB)$"
MemorySize = Annotated[str, Field(pattern=SIZE)]
ONE, SEVERAL = "<one>", "<several>"  # which form of a field an error speaks of


def one_or_several(value: object) -> str:
    return SEVERAL if isinstance(value, list) else ONE


def is_size(text: str) -> bool:
    """Whether it is a MemorySize."""
    return re.fullmatch(SIZE, text) is not None


def size_in_bytes(size: str) -> int:
    """Of a MemorySize, such as 1.5GiB."""
    return int(float(size[:-3]) * {"GiB": 2**30, "MiB": 2**20}[size[-3:]])


TextOrTexts = Annotated[Annotated[Text, Tag(ONE)] | Annotated[list[Text], Tag(SEVERAL)], Discriminator(one_or_several)]


class Section(BaseModel):
    """Frozen, and refuses keys it does not know: a typo is an error, never a silent default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
