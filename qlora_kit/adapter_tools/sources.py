"""Adapters as a command names them: read, hashed, with the run they come from; and new ones written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.adapters.files import WEIGHTS, write_adapter
from qlora_kit.adapters.folders import adapter_folder, named_folder
from qlora_kit.adapters.peft_format import StoredAdapter, read_adapter
from qlora_kit.adapters.to_lora import CONVERTIBLE, to_lora
from qlora_kit.atomic import disk_error, write_json
from qlora_kit.errors import AdapterError
from qlora_kit.model.source import sha256_file
from qlora_kit.train.run_folder import RunFolder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DEFAULTS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
}


@dataclass(frozen=True)
class Source:
    """An adapter on disk.

    Attributes:
        folder: of the adapter's two files.
        sha256: of its weights.
        run: the run that trained it, where it still lies there.
    """

    folder: Path
    stored: StoredAdapter
    sha256: str
    run: RunFolder | None

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json, with what it may leave out."""
        return DEFAULTS | self.stored.config

    @property
    def base(self) -> str:
        """The base's name, as the adapter has it."""
        return str(self.stored.config.get("base_model_name_or_path") or "an unnamed base")


def open_source(path: str | Path) -> Source:
    """The adapter of a run, of a checkpoint or of a folder.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    folder = adapter_folder(Path(path))
    return Source(folder, read_adapter(folder), sha256_file(folder / WEIGHTS), run_of(folder))


def named_sources(texts: Sequence[str | Path]) -> dict[str, Source]:
    """Adapters of one base by name: runs or adapters' folders, called after themselves, or NAME=FOLDER.

    Raises:
        AdapterError: a name that is no file's name or is there twice, another base, or as `open_source`.
    """
    found: dict[str, Source] = {}
    for text in texts:
        name, place = named_folder(text)
        if name in found or not NAME.fullmatch(name):
            raise AdapterError(
                "name of an adapter", got=name, allowed="letters, digits, . _ -, once", fix="NAME=FOLDER"
            )
        found[name] = open_source(place)
    check_same_base(list(found.values()))
    return found


def as_lora(source: Source) -> StoredAdapter:
    """The adapter for the plain base: one of PiSSA, LoftQ or QA-LoRA as `to_lora` says, another as it is."""
    if not issubclass(source.stored.method, CONVERTIBLE):
        return source.stored
    return to_lora(source.stored, source.folder)


def run_of(folder: Path) -> RunFolder | None:
    """The run that an adapter's folder lies in: RUN/adapter or RUN/checkpoints/STEP/adapter."""
    for place in (folder.absolute().parent, folder.absolute().parent.parent.parent):
        run = RunFolder(place)
        if folder.name == "adapter" and run.recipe_file.is_file():
            return run
    return None


def check_same_base(sources: list[Source]) -> None:
    """Bases are the same where their files were (of runs, which know), else where their names are.

    Raises:
        AdapterError: two differ; both are named.
    """
    first, prints = sources[0], [_fingerprint(source) for source in sources]
    for other, fingerprint in zip(sources[1:], prints[1:], strict=True):
        known = prints[0] is not None and fingerprint is not None
        if fingerprint != prints[0] if known else other.base != first.base:
            raise AdapterError(
                f"adapters of different bases: {first.folder} is of {first.base}, {other.folder} of {other.base}",
                fix="Combine adapters of one base; where both names mean the same weights, add --force",
            )


def _fingerprint(source: Source) -> str | None:
    """Hash of the base's files, as the run's manifest has it."""
    return source.run.manifest().get("base", {}).get("fingerprint") if source.run else None


def check_new(target: Path) -> None:
    """Raises AdapterError where something would be overwritten."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} is there already", fix="Give a new folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end, whole or not at all.

    Raises:
        AdapterError: something is there.
        RunError: the disk is full or not writable.
    """
    check_new(target)
    partial = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_new(
    target: Path, config: dict[str, Any], tensors: dict[str, Tensor], notes: dict[str, dict[str, Any]]
) -> None:
    """Writes an adapter into the new folder `target`, whole or not at all.

    Args:
        notes: file name to content, of JSON files beside the adapter's own.

    Raises:
        AdapterError: something is there.
        RunError: the disk is full or not writable.
    """
    with new_folder(target) as partial:
        write_adapter(partial, config, tensors)
        for name, tree in notes.items():
            write_json(partial / name, tree)
