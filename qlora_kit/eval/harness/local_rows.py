"""Benchmark rows from local files, in the shape that lm-eval's own tasks read from the hub.

FOLDER/mmlu/dev/SUBJECT_dev.csv, FOLDER/mmlu/test/SUBJECT_test.csv    question, four choices, letter; no header
FOLDER/gsm8k/train.jsonl, FOLDER/gsm8k/test.jsonl                     question, answer
FOLDER/truthfulqa/validation.json                                     question, mc1_targets, mc2_targets
FOLDER/wikitext-2/test.txt                                            articles, each below a line " = Title = "
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from qlora_kit.errors import DataError

_LETTERS = "ABCD"
_TITLE = re.compile(r"^ = [^=].*[^=] = $")
_FIX = "Take the file as it was published"


def read_mmlu(folder: Path, subject: str) -> dict[str, Dataset]:
    """Splits dev and test: `question`, `choices` (4 texts), `answer` (0..3)."""
    names = ["question", *_LETTERS, "answer"]
    texts = datasets.Features({name: datasets.Value("string") for name in names})
    how = {"header": None, "names": names, "features": texts, "keep_default_na": False}
    files = {split: folder / "mmlu" / split / f"{subject}_{split}.csv" for split in ("dev", "test")}

    def shaped(row: dict[str, Any], place: str) -> dict[str, Any]:
        if row["answer"] not in tuple(_LETTERS):
            raise DataError(f"{place}: answer", got=row["answer"], allowed="A, B, C, D", fix=_FIX)
        choices = [row[letter] for letter in _LETTERS]
        return {"question": row["question"], "choices": choices, "answer": _LETTERS.index(row["answer"])}

    return {split: _read("csv", file, shaped, **how) for split, file in files.items()}


def read_gsm8k(folder: Path, _: str) -> dict[str, Dataset]:
    """Splits train and test: `question`, `answer` (working, then `#### number`)."""

    def shaped(row: dict[str, Any], place: str) -> dict[str, Any]:
        if "####" not in _text(row, "answer", place):
            raise DataError(f"{place}: answer", got=row["answer"][-40:], allowed="a text with #### number", fix=_FIX)
        return {"question": _text(row, "question", place), "answer": row["answer"]}

    return {split: _read("json", folder / "gsm8k" / f"{split}.jsonl", shaped) for split in ("train", "test")}


def read_truthfulqa(folder: Path, _: str) -> dict[str, Dataset]:
    """Split validation: `question`, `mc1_targets` and `mc2_targets` ({`choices`, `labels`}).

    MC1's right choice comes first in the file. Here its choices are shuffled, for each question in its own way and
    always alike, so that a model that cannot tell them apart gains nothing from the order.
    """

    def shaped(row: dict[str, Any], place: str) -> dict[str, Any]:
        question = _text(row, "question", place)
        targets = {name: _targets(row, name, place) for name in ("mc1_targets", "mc2_targets")}
        if sum(targets["mc1_targets"]["labels"]) != 1:
            labels = targets["mc1_targets"]["labels"]
            raise DataError(f"{place}: mc1_targets.labels", got=labels, allowed="one 1, and 0", fix=_FIX)
        pairs = [*zip(targets["mc1_targets"]["choices"], targets["mc1_targets"]["labels"])]
        random.Random(question).shuffle(pairs)
        targets["mc1_targets"] = {"choices": [c for c, _ in pairs], "labels": [label for _, label in pairs]}
        return {"question": question, **targets}

    return {"validation": _read("json", folder / "truthfulqa" / "validation.json", shaped)}


def read_wikitext(folder: Path, _: str) -> dict[str, Dataset]:
    """Split test: `page`, a whole article."""
    file = folder / "wikitext-2" / "test.txt"
    lines = _read("text", file, lambda row, _: row, keep_linebreaks=True)["text"]
    pages = list(_articles(lines))
    if not pages:
        raise DataError(f"{file} holds no article", allowed='articles, each below a line " = Title = "', fix=_FIX)
    return {"test": Dataset.from_list([{"page": page} for page in pages])}


def _articles(lines: list[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if _TITLE.match(line.rstrip("\n")):
            if article:
                yield "".join(article)
            article = [line]
        elif article:
            article.append(line)
    if article:
        yield "".join(article)


def _read(kind: str, file: Path, shaped: Callable[[dict[str, Any], str], dict[str, Any]], **how: Any) -> Dataset:
    """The rows of one file, each through `shaped(row, place)`.

    Raises:
        DataError: the file is not there, cannot be parsed, or is empty; names it.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing", fix="Put the benchmark's file there, or give another --task-data")
    try:
        with tempfile.TemporaryDirectory() as cache:  # nothing is left in the user's cache
            found = datasets.load_dataset(
                kind, data_files={"rows": str(file)}, split="rows", cache_dir=cache, keep_in_memory=True, **how
            )
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{file} cannot be read as {kind}: {error.__cause__ or error}", fix=_FIX) from error
    rows = [shaped(dict(row), f"{file} row {number}") for number, row in enumerate(found, 1)]
    if not rows:
        raise DataError(f"{file} is empty", fix=_FIX)
    return Dataset.from_list(rows)


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {field}", got=value, allowed="a text", fix=_FIX)
    return value


def _targets(row: dict[str, Any], field: str, place: str) -> dict[str, list[Any]]:
    value = row.get(field)
    choices, labels = (value.get("choices"), value.get("labels")) if isinstance(value, dict) else (None, None)
    if not choices or not labels or len(choices) != len(labels) or set(labels) - {0, 1}:
        raise DataError(f"{place}: {field}", got=value, allowed="choices, and as many labels of 0 or 1", fix=_FIX)
    return {"choices": list(choices), "labels": list(labels)}
