"""Answering a file of prompts: row by row onto the disk, so that what broke off goes on where it was."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from qlora_runtime.atomic import atomic_file
from qlora_runtime.chat import Message
from qlora_runtime.errors import ArgumentError, BundleError
from qlora_runtime.generate import generate
from qlora_runtime.generating import GeneratingBundle
from qlora_runtime.manifest import sha256_file
from qlora_runtime.sampling import Sampling
from qlora_runtime.schema import MANIFEST
from qlora_runtime.strict_json import JsonObject
from qlora_runtime.task_rows import Row, check_writable, json_rows

PARTIAL = ".partial"
"""Ending of the file that answers are kept in until all are there."""

Prompt = str | Sequence[Message]
_ANSWER = ("text", "token_ids", "finish_reason", "prompt_tokens")


def answer_file(bundle: GeneratingBundle, prompts: Path, answers: Path, sampling: Sampling) -> int:
    """Answer each row of `prompts`; `answers` appears whole when all are done.

    Until then they are in ANSWERS.partial, each on the disk as soon as it is known. Where such a file is left
    of a run that broke off, what it holds is not asked again; rows behind that may have been mended since.

    Returns: the number of rows that were answered before.

    Raises:
        ArgumentError: a row that cannot be asked (nothing has been run then), or ANSWERS.partial is of
            another bundle, of other options or of other rows.
        BundleError: the model fails on a row; the message names file and line.
    """
    if answers.exists() and answers.samefile(prompts):
        raise ArgumentError(f"{answers} holds the prompts. Give another --output.")
    for place, row in json_rows(prompts):
        _check(bundle, place, row)
    partial = answers.with_name(answers.name + PARTIAL)
    with partial.open("a+b") as file:
        done = _resume(file, partial, _settings(bundle, sampling), prompts)
        for index, (place, row) in enumerate(json_rows(prompts)):
            if index >= done:
                _append(file, row | _answer(bundle, place, row, sampling))
        _publish(file, answers)
    partial.unlink()
    return done


def _check(bundle: GeneratingBundle, place: str, row: Row) -> None:
    """Raises ArgumentError for a row that cannot be asked about."""
    prompt = _prompt(place, row)
    if taken := [column for column in _ANSWER if column in row]:
        raise ArgumentError(f"{place}: the answer's columns {taken} are there already. Rename them.")
    check_writable(place, row)
    try:
        bundle.check_room(bundle.encode_prompt(prompt))
    except BundleError as error:
        raise type(error)(f"{place}: {error}") from error


def _prompt(place: str, row: Row) -> Prompt:
    asked = [row[name] for name in ("prompt", "messages") if name in row]
    if len(asked) == 1 and isinstance(asked[0], str if "prompt" in row else list):
        return asked[0]  # type: ignore[no-any-return]
    raise ArgumentError(
        f'{place}: expected {{"prompt": TEXT}} or {{"messages": [...]}}, got {json.dumps(row)[:80]}'
    )


def _answer(bundle: GeneratingBundle, place: str, row: Row, sampling: Sampling) -> Row:
    try:
        found = generate(bundle, _prompt(place, row), sampling)
    except BundleError as error:
        raise type(error)(f"{place}: {error}") from error
    return {name: getattr(found, name) for name in _ANSWER}


def _settings(bundle: GeneratingBundle, sampling: Sampling) -> JsonObject:
    """What answers depend on besides their prompts."""
    return {
        "bundle": sha256_file(bundle.directory / MANIFEST),
        "sampling": asdict(sampling) | {"stop": list(sampling.stop)},
    }


def _resume(file: BinaryIO, partial: Path, settings: JsonObject, prompts: Path) -> int:
    """Cut off a line that was not finished; return how many rows are answered."""
    file.seek(0)
    lines = list(_whole_lines(file))
    file.truncate(sum(map(len, lines)))
    if not lines:
        _append(file, settings)
        return 0
    fix = f"Repeat what it was begun with, or remove {partial} to begin anew."
    if _parsed(partial, lines[0]) != settings:
        raise ArgumentError(f"{partial} was begun with another bundle or other options. {fix}")
    rows = json_rows(prompts)
    for number, line in enumerate(lines[1:], start=2):
        _, row = next(rows, ("", None))
        answered = _parsed(partial, line)
        if row is None or {name: answered.get(name) for name in row} != row:
            raise ArgumentError(f"{partial}, line {number}: {prompts} has another row there. {fix}")
    return len(lines) - 1


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    return (line for line in file if line.endswith(b"\n"))


def _parsed(partial: Path, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{partial} is damaged ({error}). Remove it to begin anew.") from error
    if not isinstance(value, dict):
        raise ArgumentError(f"{partial} is damaged (no object). Remove it to begin anew.")
    return value


def _append(file: BinaryIO, row: Row) -> None:
    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    file.flush()
    os.fsync(file.fileno())


def _publish(file: BinaryIO, answers: Path) -> None:
    """The answers, without the settings before them."""
    file.seek(0)
    lines = _whole_lines(file)
    next(lines)
    with atomic_file(answers) as target:
        target.writelines(lines)
