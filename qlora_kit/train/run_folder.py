"""The run folder: its files, its lock, its manifest and metrics."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_kit.atomic import disk_error, write_atomically, write_json
from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import changed_fields, dump_recipe, load_recipe, recipe_to_tree

FORMAT = "qlora-run/1"
# Fields that a resumed run may change: they move no bit of the adapter, nor which step's adapter is published.
FREE_FIELDS = (
    "run.name:",
    "run.out_dir:",
    "base.cache:",
    "train.allocator:",
    "train.trackers:",
    "train.log_every:",
    "train.memory_limit:",
    "train.save_every:",
    "train.keep_checkpoints:",
    "train.threads:",  # the number itself is checked against the checkpoint's
    "eval.answer:",
    "eval.choices:",
    "eval.max_rows:",
    "eval.max_new_tokens:",
    "eval.dtype:",
    "eval.samples:",
    "export.",
)


# All that a run makes, the manifest first: what begins anew here removes them, and nothing else.
RUN_FILES = (
    "manifest.json",
    "checkpoints",
    "adapter",
    "metrics.jsonl",
    "samples.json",
    "teacher.safetensors",
    "report.html",
    "tokenizer",
    "trackers",
    "merge.json",
    "merged",
    "bundles",
    "eval",
)


class RunFolder:
    """RUN/: recipe.yaml, manifest.json, metrics.jsonl, checkpoints/, adapter/, eval/, merged/, bundles/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file, self.manifest_file = path / "recipe.yaml", path / "manifest.json"
        self.metrics_file, self.checkpoints = path / "metrics.jsonl", path / "checkpoints"
        self.adapter, self.tokenizer = path / "adapter", path / "tokenizer"
        self.teacher = path / "teacher.safetensors"
        self.merged, self.bundles = path / "merged", path / "bundles"
        self.overwrite = False  # an existing run here may be lost

    @classmethod
    def create(cls, recipe: Recipe, overwrite: bool = False) -> RunFolder:
        """A place for a new run. Nothing is written before `begin`: a run that cannot start leaves nothing behind.

        Raises:
            RunError: the folder holds a run already.
        """
        run = cls(Path(recipe.run.out_dir) / recipe.run.name)
        run.overwrite = overwrite
        run.check_new()
        return run

    def check_new(self) -> None:
        """Raises RunError where a run would be lost that `create` was not told to overwrite."""
        if self.recipe_file.exists() and not self.overwrite:
            raise RunError(
                f"{self.path} holds a run already",
                fix="Go on with it by --resume, start again by --overwrite, or give another run.name",
            )

    def begin(self, recipe: Recipe) -> None:
        """Removes what an earlier run left here (and no file that is not a run's), and writes the recipe.

        Raises:
            RunError: the folder holds a run already, or the disk is full.
        """
        self.check_new()
        for name in RUN_FILES:
            entry = self.path / name
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
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
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process, and removes it where nothing came to lie in it.

        Raises:
            RunError: another process holds it.
        """
        if not is_first_process():  # of several that train together the first holds it for all
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from None
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.path} is in use by another process", fix="Wait for it, or stop it") from None
        try:
            yield
        finally:
            if [entry.name for entry in self.path.iterdir()] == [".lock"]:
                shutil.rmtree(self.path)
            lock.release()

    def how_to_resume(self) -> str:
        return f"Go on with: qlora-kit train --resume {self.path}"

    def manifest(self) -> dict[str, Any]:
        """manifest.json; empty where there is none yet.

        Raises:
            RunError: it is not JSON.
        """
        if not self.manifest_file.exists():
            return {}
        try:
            return json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{self.manifest_file} is not JSON: {error}", fix="Put it back, or --overwrite") from None

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
        """Adds a line to metrics.jsonl.

        Raises:
            RunError: the disk is full.
        """
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise disk_error(self.metrics_file, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl (a kill can tear the last)."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def drop_metrics_after(self, step: int) -> None:
        """Forgets what a killed run wrote after the checkpoint that is resumed."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


def is_first_process() -> bool:
    """Whether this is the one process, or the first of several that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
