"""Held-out rows of a task with what was read of them; a row is one, however many windows it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_kit.data.dataset import prepare, prepare_eval
from qlora_kit.data.eval_rows import sample_of
from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import Encoded
from qlora_kit.data.reading import eval_source
from qlora_kit.data.report import DataReport
from qlora_kit.data.sources import read_rows
from qlora_kit.errors import EvalError
from qlora_kit.recipe import DataSection, DataSource, Recipe
from qlora_kit.tasks.task import Task


@dataclass(frozen=True)
class TaskRow:
    """A row: what was read of it, and what the model sees."""

    example: Any
    """A TaskExample."""
    windows: list[Encoded]
    """One, or several where its text is longer than the model reads at once."""
    place: str
    """`FILE row N`."""


def held_out_task_rows(
    recipe: Recipe, task: Task[Any], tokenizer: PreTrainedTokenizerBase, max_rows: int | None, report: DataReport
) -> list[TaskRow]:
    """The rows that training held out, in the order of their sources; of more than `max_rows`, a seeded sample.

    Sources that several rows turn into another target are one row, with all of them to compare with.

    Args:
        report: gets the counts of the sources that are read.

    Raises:
        DataError: a row cannot be used, or there are none.
    """
    section, seed = recipe.data, recipe.run.seed
    if section.eval is not None:
        encoded = prepare_eval(section, tokenizer, report, task)
    else:
        data = prepare(section, tokenizer, seed, task)
        encoded, report.train = data.eval, data.report.train
    windows: dict[tuple[int, int], list[Encoded]] = {}
    for row in encoded:
        windows.setdefault((row.source, row.row), []).append(row)
    examples = _examples(section, task, windows) if task.settings.type == "seq2seq" else {}
    grouped = _one_a_source(list(windows), examples)
    firsts = [windows[place][0] for place in grouped]
    wanted = [(firsts[k].source, firsts[k].row) for k in sample_of(firsts, max_rows, seed)]
    examples = {place: grouped[place] for place in wanted} if examples else _examples(section, task, wanted)
    paths = [source.path for source in _sources(section)]
    rows = []
    for place in wanted:
        example, cut = examples[place], any(row.truncated for row in windows[place])
        found = task.encode_whole(example, tokenizer, section) if cut else _once(windows[place])
        rows.append(TaskRow(example, found, f"{paths[place[0]]} row {place[1]}"))
    return rows


def _one_a_source(places: list[tuple[int, int]], examples: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
    """(source, row) to example: rows that turn one text into several are the first of them, with the targets of all.

    Args:
        examples: of sequence to sequence; none for tasks whose rows stand for themselves.
    """
    if not examples:
        return dict.fromkeys(places)
    first_of: dict[str, tuple[int, int]] = {}
    targets: dict[str, dict[str, None]] = {}
    for place in places:
        example = examples[place]
        first_of.setdefault(example.source, place)
        targets.setdefault(example.source, {}).update(dict.fromkeys([example.target, *example.also]))
    return {place: replace(examples[place], also=tuple(targets[text])[1:]) for text, place in first_of.items()}


def _once(windows: list[Encoded]) -> list[Encoded]:
    """A row that was drawn again brings the same windows again."""
    return list({(row.input_ids.tobytes(), row.labels.tobytes(), row.second): row for row in windows}.values())


def _sources(section: DataSection) -> list[DataSource]:
    """In the order that `Encoded.source` counts them."""
    held_out = eval_source(section)
    return [*section.sources(), *([held_out] if held_out else [])]


def _examples(section: DataSection, task: Task[Any], wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Any]:
    """(source, row) to example. Every row is parsed: the first settles the columns of all."""
    places, found = set(wanted), {}
    for k, source in enumerate(_sources(section)):
        parser, last = task.parser(section, source), max((row for at, row in places if at == k), default=0)
        for raw in read_rows(source):
            if raw.number > last:
                break
            if isinstance(raw.value, RowError):
                continue
            try:
                example = parser.parse(raw.number, raw.value)
            except RowError:
                continue  # counted or refused where the rows were prepared
            if (k, raw.number) in places:
                found[k, raw.number] = example
    if missing := places - set(found):
        source_at, row = min(missing)
        raise EvalError(f"{_sources(section)[source_at].path} row {row} changed while it was read", fix="Try again")
    return found
