"""Files of RUN/eval that name their format: numbers are finite, and what is damaged is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qlora_kit.atomic import write_atomically
from qlora_kit.errors import EvalError, RunError

T = TypeVar("T")


def write_finite(path: Path, tree: dict[str, Any], what: str) -> None:
    """Writes a tree with its `format`: whole and on the disk, or not at all.

    Args:
        what: what the tree holds, in the plural.

    Raises:
        EvalError: a number is not finite and so has no place in JSON.
        RunError: the disk is full.
    """
    try:
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise EvalError(f"the {what} hold a number that is not finite: {error}") from error
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text)


def read_as(path: Path, form: str, parse: Callable[[dict[str, Any]], T], missing: RunError, fix: str) -> T:
    """What `parse` makes of a tree that `write_finite` wrote.

    Args:
        form: the `format` that it must name.
        missing: raised where there is no file.
        fix: what to do about a file that is no such tree.

    Raises:
        RunError: the file is missing, not JSON, or of another format.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or tree.get("format") != form:
            raise RunError(f"{path} is not of the format {form}", fix=fix)
        return parse(tree)
    except FileNotFoundError:
        raise missing from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged: {error!r}", fix=fix) from error
