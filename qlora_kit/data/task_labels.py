"""Names of labels, their weights, and a split that keeps their shares."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from qlora_kit.data.examples import RowError
from qlora_kit.data.task_examples import LabelledImage, LabelledText, TaggedWords, TaskExample
from qlora_kit.errors import DataError
from qlora_kit.task_settings import TaskSettings

SHOWN = 10
_BETWEEN_WORDS = re.compile(r"(?<=\w)[\s_.:;,!/-]+(?=\w|$)")


def names_of(example: TaskExample) -> tuple[str, ...]:
    """The labels in an example, each as often as it stands there; none of an example without."""
    if isinstance(example, TaggedWords):
        return example.tags or ()
    label = example.label if isinstance(example, LabelledText | LabelledImage) else None
    if isinstance(label, tuple):
        return label
    return (label,) if isinstance(label, str) else ()


def collect_labels(examples: Iterable[TaskExample], settings: TaskSettings) -> list[str]:
    """All labels of the training examples in the order of the model's outputs.

    Sorted; of BIO tags O first, then B-TYPE and I-TYPE of each type, both where only one of them was seen: what
    is scored may hold the other. Of plain tags O first where there is one.

    Raises:
        DataError: there are fewer than two.
    """
    names = {name for example in examples for name in names_of(example)}
    if getattr(settings, "scheme", None) == "bio":
        types = sorted({name[2:] for name in names if name != "O"})
        labels = ["O", *(mark + kind for kind in types for mark in ("B-", "I-"))]
    else:
        labels = sorted(names, key=lambda name: (settings.type == "tagging" and name != "O", name))
    if len(labels) < 2:
        what = "tags" if settings.type == "tagging" else "labels"
        raise DataError(
            f"the training rows have {len(labels)} {what}: nothing to tell apart",
            got=labels,
            allowed="at least two",
            fix="Check data.columns and the column of the labels",
        )
    return labels


class LabelCounts:
    """In how many training rows each label stands, to doubt those that may be slips of the pen.

    Attributes:
        rows: label, or type of the spans that tags mark, to number of rows.
        first: the place of the first.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, example: TaskExample, place: str) -> None:
        """Counts a row's labels; `place` names file and row."""
        tagged = isinstance(example, TaggedWords)
        for name in {name[2:] if tagged and name[:2] in ("B-", "I-") else name for name in names_of(example)}:
            self.rows[name] += 1
            self.first.setdefault(name, place)

    def doubts(self) -> list[str]:
        """Sentences on labels that differ in case, spaces or punctuation alone, and on labels of a single row."""
        alike: dict[str, list[str]] = {}
        for name in sorted(self.rows):
            alike.setdefault(_BETWEEN_WORDS.sub("", name).casefold(), []).append(name)
        groups = [" and ".join(map(self._shown, names)) for names in alike.values() if len(names) > 1]
        single = [self._shown(name) for name in sorted(self.rows) if self.rows[name] == 1]
        lines = [f"are these labels one? {', '.join(groups[:SHOWN])}"] if groups else []
        if single and len(single) < len(self.rows):
            more = f" and {len(single) - SHOWN} more" if len(single) > SHOWN else ""
            lines.append(f"labels of one row alone: {', '.join(single[:SHOWN])}{more}")
        return lines

    def _shown(self, name: str) -> str:
        count = self.rows[name]
        return f"{name!r} ({'' if count == 1 else f'{count} rows, first '}{self.first[name]})"


def check_label(name: str, labels: Sequence[str], column: str) -> None:
    """Nothing, where `name` is one of `labels`, or where there are none to choose from.

    Raises:
        RowError: it is not; lists the labels that look like it.
    """
    if not labels or name in labels:
        return
    close = get_close_matches(name, labels, n=3) or [label for label in labels if label.lower() == name.lower()]
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    raise RowError(
        f"{column} has {name!r}, which is not among the labels",
        reason="unknown label",
        allowed=", ".join(labels[:SHOWN]) + more,
        fix=f"Did you mean {' or '.join(map(repr, close))}?" if close else "Add it to task.labels, or mend the row",
    )


def class_weights(wanted: str | dict[str, float], names: Iterable[str], labels: Sequence[str]) -> np.ndarray:
    """float64 [labels]: what the loss of a row is multiplied with, by its label.

    `balanced` is scikit-learn's: rows / (labels * rows of the label); a label without rows weighs 1. Labels that a
    dict does not name weigh 1.

    Args:
        wanted: `none`, `balanced`, or weights by name.
        names: the label of each training row.
        labels: in the order of the model's outputs.

    Raises:
        DataError: a weight is named for no label.
    """
    if isinstance(wanted, dict):
        if unknown := sorted(set(wanted) - set(labels)):
            raise DataError("task.class_weights names no label", got=unknown, allowed=", ".join(labels))
        return np.array([wanted.get(label, 1.0) for label in labels])
    if wanted == "none":
        return np.ones(len(labels))
    counts = Counter(names)
    rows = counts.total()
    return np.array([rows / (len(labels) * counts[label]) if counts[label] else 1.0 for label in labels])


def strata(examples: Sequence[TaskExample]) -> list[str]:
    """What of each example `stratified_mask` should share out: its label, or its rarest one; empty where it has none.

    Of tagged words the rarest tag, so that rare entities are found on both sides.
    """
    counts = Counter(name for example in examples for name in set(names_of(example)))
    return [min(names_of(example), key=lambda name: (counts[name], name), default="") for example in examples]


def stratified_mask(keys: np.ndarray, labels: Sequence[Hashable], fraction: float) -> np.ndarray:
    """bool [rows]: which rows are held out, `fraction` of each label's rows.

    Of each label the rows with the lowest keys are taken. Rows with one key are never parted; where they differ in
    their labels, all count for the label of the first. A label with two keys or more has rows on both sides.

    Args:
        keys: uint64 [rows], seeded hashes of what must not be on both sides (see `split_key`).
        labels: the label of each row.
        fraction: share to hold out, between 0 and 1.

    Raises:
        DataError: no label has two different keys, so that nothing could be held out.
    """
    rows_of_key: dict[int, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        rows_of_key.setdefault(key, []).append(row)
    keys_of_label: dict[Hashable, list[int]] = {}
    for key, rows in rows_of_key.items():
        keys_of_label.setdefault(labels[rows[0]], []).append(key)
    mask = np.zeros(len(keys), dtype=bool)
    for of_label in keys_of_label.values():
        wanted = fraction * sum(len(rows_of_key[key]) for key in of_label)
        held_out = 0
        for key in sorted(of_label)[:-1]:  # the last one is always trained on
            size = len(rows_of_key[key])
            if held_out and held_out + size / 2 > wanted:
                break
            mask[rows_of_key[key]] = True
            held_out += size
    if not mask.any():
        raise DataError(
            f"{len(keys)} usable rows, and no label has two different texts: none can be held out",
            fix="Add rows, or set data.eval",
        )
    return mask


def label_name(value: Any, labels: Sequence[str], column: str) -> str:
    """The name of a label as it stands in a cell.

    Text is stripped of white space around it; true and false are named so. An integer, or text that is one, is an
    index into `labels` where these are given and none of them is an integer itself; otherwise its decimal text is
    the name.

    Raises:
        RowError: it is neither text nor integer, empty, no index, or not among `labels`.
    """
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(
            f"{column} is {type(value).__name__}, not a label",
            reason=f"{column} no label",
            got=value,
            allowed="text or an integer",
            fix="For numbers to predict set task.type: regression; for lists of labels task.multi_label: true",
        )
    name = value.strip()
    if not name:
        raise RowError(f"{column} is empty", reason=f"empty {column}", fix="Fill it, or set data.bad_rows: skip")
    if labels and _is_integer(name) and not any(map(_is_integer, labels)):
        return _at(int(name), labels, column)
    check_label(name, labels, column)
    return name


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _at(index: int, labels: Sequence[str], column: str) -> str:
    if 0 <= index < len(labels):
        return labels[index]
    raise RowError(
        f"{column} is {index}, no index into task.labels",
        reason="unknown label",
        allowed=f"0 to {len(labels) - 1}, or a name",
    )
