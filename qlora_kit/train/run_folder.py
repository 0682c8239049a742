"""The run folder: its files, its lock, and writes that are whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import changed_fields, dump_recipe, load_recipe, recipe_to_tree

FORMAT = "qlora-run/1"
# Fields that a resumed run may change: they move no bit of the adapter.
FREE_FIELDS = ("run.name", "run.out_dir", "train.trackers", "train.keep_checkpoints", "eval.", "export.")


class RunFolder:
    """RUN/: recipe.yaml, manifest.json, metrics.jsonl, checkpoints/, adapter/, eval/, merged/, bundles/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file, self.manifest_file = path / "recipe.yaml", path / "manifest.json"
        self.metrics_file, self.checkpoints = path / "metrics.jsonl", path / "checkpoints"
        self.adapter, self.tokenizer = path / "adapter", path / "tokenizer"
        self.merged, self.bundles = path / "merged", path / "bundles"

    @classmethod
    def create(cls, recipe: Recipe, overwrite: bool = False) -> RunFolder:
        """The folder of a new run. Nothing is written before `begin`, so that a wrong recipe leaves no trace.

        Raises:
            RunError: the folder holds a run already, or another process uses it.
        """
        run = cls(Path(recipe.run.out_dir) / recipe.run.name)
        run._check_new(overwrite)
        if run.path.is_dir():
            with run.lock(wait_s=1.0):
                pass
        return run

    def begin(self, recipe: Recipe, overwrite: bool = False) -> None:
        """Writes the resolved recipe, in place of an earlier run where `overwrite` says so. Hold the lock.

        Raises:
            RunError: the folder holds a run already.
        """
        self._check_new(overwrite)
        if self.recipe_file.exists():
            self._clear()
        write_atomically(self.recipe_file, dump_recipe(recipe))

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunError: there is no run.
        """
        run = cls(Path(path))
        if not run.recipe_file.is_file():
            raise RunError(f"{path} is no run folder: recipe.yaml is missing", fix="Give the folder that train made")
        return run

    def recipe(self) -> Recipe:
        return load_recipe(str(self.recipe_file))

    def check_same_recipe(self, recipe: Recipe) -> None:
        """Raises RunError, naming the fields, where `recipe` would train another adapter than this run's."""
        changes = [
            change
            for change in changed_fields(recipe_to_tree(self.recipe()), recipe_to_tree(recipe))
            if not change.startswith(FREE_FIELDS)
        ]
        if changes:
            raise RunError(
                f"{self.path} cannot be resumed with a changed recipe: {'; '.join(changes)}",
                fix="Take the change back, or start a new run under another run.name",
            )

    @contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Holds the folder for this process; makes it where it is missing.

        Raises:
            RunError: another process holds it, or it cannot be made.
        """
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait_s)
        except OSError as error:
            raise disk_error(self.path, error) from error
        except Timeout:
            raise RunError(f"{self.path} is in use by another process", fix="Wait for it, or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def manifest(self) -> dict[str, Any]:
        return json.loads(self.manifest_file.read_text(encoding="utf-8")) if self.manifest_file.exists() else {}

    def update_manifest(self, **fields: Any) -> dict[str, Any]:
        """Merges `fields` into manifest.json, atomically, and returns the whole."""
        manifest = {"format": FORMAT, "name": self.path.name, "created": now(), **self.manifest(), **fields}
        write_json(self.manifest_file, manifest)
        return manifest

    def note(self, text: str) -> None:
        """Adds a line to the manifest's notes, once."""
        notes = self.manifest().get("notes", [])
        if text not in notes:
            self.update_manifest(notes=[*notes, text])

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl (a kill can tear the last)."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def drop_metrics_after(self, step: int) -> None:
        """Forgets what a killed run wrote after the checkpoint that is resumed."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def _check_new(self, overwrite: bool) -> None:
        if self.recipe_file.exists() and not overwrite:
            raise RunError(
                f"{self.path} holds a run already",
                fix="Go on with it by --resume, start again by --overwrite, or give another run.name",
            )

    def _clear(self) -> None:
        """Removes all but the lock and recipe.yaml, which marks the folder as a run's."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry not in (self.path / ".lock", self.recipe_file):
                entry.unlink()


def write_atomically(path: Path, text: str) -> None:
    """The file is the old or the new one, never half of it.

    Raises:
        RunError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def write_json(path: Path, tree: Any) -> None:
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def disk_error(path: Path, error: OSError) -> RunError:
    """An OSError of a write, as an error that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full while writing {path}", fix="Free some space, then resume with --resume")
    return RunError(f"{path} cannot be written: {error.strerror}", fix="Check the folder's permissions, then --resume")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
