"""Tasks by name: lm-eval's own definitions (prompts, few-shot, filters, metrics), on rows from the hub or local files.

A local task is lm-eval's definition with the place of its rows changed, and nothing else: its numbers stay those of the
task it is named after.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from qlora_kit.errors import EvalError
from qlora_kit.eval.harness.local_rows import read_gsm8k, read_mmlu, read_truthfulqa, read_wikitext

_DEFINITIONS = Path(lm_eval.tasks.__file__).parent
_FEWSHOT_SEED = 1234  # lm-eval's default


class LocalSource(NamedTuple):
    """How a data set of the hub is had from local files."""

    folder: str
    """Where lm-eval defines its tasks."""
    read: Callable[[Path, str], dict[str, Dataset]]
    changes: dict[str, Any]
    """Fields of the definition that do not fit the local rows."""


LOCAL = {  # the hub's data set, and its configuration where only that one is had
    "cais/mmlu": LocalSource("mmlu/default", read_mmlu, {}),
    "openai/gsm8k": LocalSource("gsm8k", read_gsm8k, {}),
    "truthfulqa/truthful_qa multiple_choice": LocalSource("truthfulqa", read_truthfulqa, {}),
    "EleutherAI/wikitext_document_level": LocalSource(
        "wikitext", read_wikitext, {"training_split": None, "validation_split": None}
    ),
}
_SHUFFLED = {"truthfulqa_mc1": {"doc_to_target": "{{mc1_targets.labels.index(1)}}"}}


def load_tasks(names: list[str], folder: Path | None, few_shot: int | None = None) -> dict[str, Any]:
    """lm-eval's tasks and groups of these names, ready for `lm_eval.evaluate`.

    Args:
        folder: with the local files; None loads what lm-eval names from the hub.
        few_shot: examples in the prompt, instead of the task's own number (tasks that fix 0 keep it).

    Raises:
        EvalError: there is no such task, its rows cannot be had from the hub, or it is named twice.
        DataError: a local file is missing or wrong.
    """
    with _quiet():
        manager = _hub_manager() if folder is None else _local_manager()
        for name in names:
            _check_name(name, manager, local=folder is not None)
        wanted: list[Any] = list(names)
        if folder is not None:
            wanted = [built for name in names for built in _build(manager, name, folder)]
        loaded = _loaded(manager, wanted)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if few_shot is None or own == 0 else few_shot)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _loaded(manager: TaskManager, wanted: list[Any]) -> dict[str, Any]:
    try:
        return dict(manager.load(wanted))
    except (OSError, datasets.exceptions.DatasetsError, ValueError) as error:
        fix = "Name a task once, and where the hub cannot be reached give --task-data"
        raise EvalError(f"a task cannot be loaded: {error}", fix=fix) from error


def local_names() -> list[str]:
    """Tasks, groups and tags that local files are enough for."""
    manager = _local_manager()
    return [name for name in manager.all_tasks if any(_leaves(manager, name))]


def _hub_manager() -> TaskManager:
    return TaskManager()


def _local_manager() -> TaskManager:
    folders: list[str | Path] = [_DEFINITIONS / source.folder for source in LOCAL.values()]
    return TaskManager(include_defaults=False, include_path=folders)


def _check_name(name: str, manager: TaskManager, local: bool) -> None:
    known = [known for known in manager.all_tasks if not local or any(_leaves(manager, known))]
    if name in known:
        return
    shown = [known for known in known if "_" not in known or known.startswith("truthfulqa")] if local else None
    allowed = ", ".join([*(shown or difflib.get_close_matches(name, known, 8)), *(["mmlu_SUBJECT"] if local else [])])
    fix = "Without --task-data every task of lm-eval's is there" if local else "List them all: lm-eval ls tasks"
    raise EvalError("no such task", got=name, allowed=allowed, fix=fix)


def _build(manager: TaskManager, name: str, folder: Path) -> Iterator[Task | Group]:
    """The task of this name, the group with all it holds, or the tasks of a tag, on local rows."""
    entry = manager.task_index[name]
    if name in manager.all_tags:
        for member in sorted(entry.tags):
            if _source(manager, member):
                yield from _build(manager, member, folder)
    elif name in manager.all_groups:
        group = Group.from_config(dict(entry.cfg or {}))
        for member in (entry.cfg or {})["task"]:
            for built in _build(manager, member, folder):
                group.add(built)
        yield group
    elif source := _source(manager, name):
        config = entry.cfg or {}
        rows = partial(_rows, source, folder, str(config.get("dataset_name")))
        changed = {"task": name, "custom_dataset": rows, **source.changes, **_SHUFFLED.get(name, {})}
        yield manager.load({"group": "local", "task": [changed]})["tasks"][name]


def _rows(source: LocalSource, folder: Path, dataset_name: str, **_: Any) -> dict[str, Dataset]:
    return source.read(folder, dataset_name)


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    """Tasks with local rows at or below a name."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if name in manager.all_tags else (entry.cfg or {}).get("task")
    if isinstance(members, list):
        for member in members:
            yield from _leaves(manager, member)
    elif _source(manager, name):
        yield name


def _source(manager: TaskManager, name: str) -> LocalSource | None:
    config = manager.task_index[name].cfg or {}
    path = config.get("dataset_path")
    return LOCAL.get(str(path)) or LOCAL.get(f"{path} {config.get('dataset_name')}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a bar and a warning for each of MMLU's 57 subjects."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
