"""What is said of rows that a task cannot use; each error names file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_rows import parser, refuse, source

from qlora_kit.data.examples import RowError
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import TASKS

CLASSIFICATION = [
    ({"text": "t"}, {}, r"row 2: label is missing: the row has text\. Fill it"),
    ({"text": "t", "label": None}, {}, r"row 2: label is null"),
    ({"text": "t", "label": ""}, {}, r"row 2: label is empty"),
    ({"text": "t", "label": 1.5}, {}, r"label is float, not a label \(got 1\.5\).*task\.type: regression"),
    ({"text": "t", "label": ["a"]}, {}, r"label is list, not a label.*task\.multi_label: true"),
    ({"text": " ", "label": "a"}, {}, r"row 2: text is empty"),
    ({"text": "a \ud800 film", "label": "a"}, {}, r"row 2: text holds half a surrogate pair \(got '\\ud800'\).*Mend"),
    ({"text": 5, "label": "a"}, {}, r"row 2: text is int, not text \(got 5\)"),
    ({"label": "a"}, {}, r"row 2: text is missing: the row has label"),
    ({"text": "t", "label": "c"}, {"labels": ["a", "b"]}, r"label has 'c', which is not among the labels"),
    ({"text": "t", "label": 2}, {"labels": ["a", "b"]}, r"label is 2, no index into task\.labels\. Allowed: 0 to 1"),
    ({"text": "t", "label": -1}, {"labels": ["a", "b"]}, r"label is -1, no index"),
    ({"text": "t", "label": 3}, {"multi_label": True}, r"label is int \(got 3\).*a list of labels, or text with ','"),
    ({"text": "t", "label": ["a", ""]}, {"multi_label": True}, r"label\[1\] is empty"),
    ({"text": "t", "label": "a,b,a"}, {"multi_label": True}, r"label names a twice"),
    (
        {"text": "t", "label": [0, 1]},
        {"multi_label": True},
        r"a list of 0 and 1, which may be .*names; where they are numbers",
    ),
]
TAGGING = [
    ({"words": "a b", "tags": ["O"]}, {}, r"row 2: words is str, not a list.*CSV hold no lists"),
    ({"words": ["a"], "tags": "O"}, {}, r"tags is str, not a list"),
    ({"words": [], "tags": []}, {}, r"words is empty"),
    ({"words": ["a", "b"], "tags": ["O"]}, {}, r"2 words, but 1 tags.*one tag"),
    ({"words": ["a", " "], "tags": ["O", "O"]}, {}, r"words\[1\] is no word \(got ' '\)"),
    ({"words": ["a", "\udc00"], "tags": ["O", "O"]}, {}, r"words\[1\] holds half a surrogate pair \(got '\\udc00'\)"),
    ({"words": ["a", 5], "tags": ["O", "O"]}, {}, r"words\[1\] is no word \(got 5\)"),
    ({"words": ["a"], "tags": [3]}, {}, r"tags\[0\] is the number 3, which has no name.*task\.labels"),
    ({"words": ["a"], "tags": [3]}, {"labels": ["O", "B-X", "I-X"]}, r"tags\[0\] is 3, no index into task\.labels"),
    ({"words": ["a"], "tags": ["B-Y"]}, {"labels": ["O", "B-X", "I-X"]}, r"tags\[0\] has 'B-Y'.*Did you mean 'B-X'"),
    ({"words": ["a"], "tags": ["NN"]}, {}, r"tags\[0\] of 'a' is no BIO tag \(got 'NN'\).*task\.scheme: plain"),
    ({"words": ["a"], "tags": ["S-X"]}, {}, r"is no BIO tag \(got 'S-X'\)"),
    ({"words": ["a"], "tags": ["B-"]}, {}, r"is no BIO tag \(got 'B-'\)"),
    ({"words": ["a", "b"], "tags": ["O", "I-X"]}, {}, r"tags\[1\] of 'b' is I-X after O: the span has no beginning"),
    ({"words": ["a", "b"], "tags": ["B-Y", "I-X"]}, {}, r"is I-X after B-Y.*Make it B-X, or set task\.broken_spans"),
    ({"words": ["a"], "tags": [None]}, {}, r"tags\[0\] is NoneType, not a label"),
]
REGRESSION: list[Any] = [
    (
        {"text": "t", "label": 1e39},
        {},
        r"label is not finite \(got 1e\+39\)\. Allowed: numbers of float32: -3\.403e\+38",
    ),
    ({"text": "t", "label": "-1e39"}, {}, r"label is not finite \(got '-1e39'\)"),
    ({"text": "t", "label": "1_000"}, {}, r"label is no number \(got '1_000'\)"),
    ({"text": "t", "label": "many"}, {}, r"label is no number \(got 'many'\)"),
    ({"text": "t", "label": "1,5"}, {}, r"label is no number \(got '1,5'\)"),
    ({"text": "t", "label": True}, {}, r"label is no number \(got True\)"),
    ({"text": "t", "label": [1]}, {}, r"label is no number \(got \[1\]\)"),
    ({"text": "t", "label": float("nan")}, {}, r"label is not finite \(got nan\)"),
    ({"text": "t", "label": "inf"}, {}, r"label is not finite \(got 'inf'\)"),
    ({"text": "t", "label": 10**400}, {}, r"label is no number"),
]
SEQ2SEQ: list[Any] = [
    ({"source": "s", "target": ""}, {}, r"target is empty"),
    ({"source": "s"}, {}, r"target is missing: the row has source"),
    ({"source": ["s"], "target": "t"}, {}, r"source is list, not text"),
]
FIRST: dict[str, dict[str, Any]] = {
    "classification": {"text": "t", "label": "a"},
    "tagging": {"words": ["a"], "tags": ["O"]},
    "regression": {"text": "t", "label": 1},
    "seq2seq": {"source": "s", "target": "t"},
}
ROWS = [
    *(("classification", *case) for case in CLASSIFICATION),
    *(("tagging", *case) for case in TAGGING),
    *(("regression", *case) for case in REGRESSION),
    *(("seq2seq", *case) for case in SEQ2SEQ),
]


@pytest.mark.parametrize(("task", "row", "settings", "message"), ROWS)
def test_rows(task: str, row: Any, settings: Any, message: str, tmp_path: Path) -> None:
    first = FIRST[task] | ({"label": []} if settings.get("multi_label") else {})
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (first, row)))
    refuse(task, tmp_path / "bad.jsonl", rf"bad\.jsonl row 2: .*{message.removeprefix('row 2: ')}", **settings)


COLUMNS = [
    ("classification", {"a": 1, "label": "b"}, {}, r"no column for 'text' \(got \['a', 'label'\]\)\. Allowed: text, s"),
    ("classification", {"text": "t", "a": 1}, {}, r"no column for 'label'.*label, labels, category.*\{label: text\}"),
    ("classification", {"text": "t", "review": "r", "label": 1}, {}, r"several columns for 'text': text, review"),
    ("classification", {"text": "t", "label": 1, "category": 2}, {}, r"several columns for 'label': label, category"),
    (
        "classification",
        {"premise": "p", "hypothesis": "h", "text": "t", "label": 1},
        {},
        r"several columns for 'text': hypothesis, premise, text",
    ),
    ("classification", {"text": "t", "stars": 1}, {"label": "kind"}, r"no column 'kind', which data\.columns names"),
    (
        "classification",
        {"t": "t", "label": 1},
        {"text": "body"},
        r"no column 'body', which data\.columns names for 'te",
    ),
    (
        "classification",
        {"text": "t", "label": 1},
        {"prompt": "text"},
        r"classification has no 'prompt'.*text, label, p",
    ),
    (
        "tagging",
        {"words": ["a"], "ner_tags": [], "pos_tags": []},
        {},
        r"several columns for 'tags': ner_tags, pos_tags",
    ),
    ("question_answering", {"question": "q", "answers": []}, {}, r"no column for 'context'.*context, passage"),
    ("seq2seq", {"document": "d", "article": "a", "summary": "s"}, {}, r"several columns for 'source'"),
    ("seq2seq", {"translation": {"en": "a"}}, {}, r"no column for 'target' \(got \['translation\.en'\]\)"),
    ("speech_recognition", {"audio": "a.wav"}, {}, r"no column for 'text'.*transcription"),
    ("image_classification", {"path": "a", "file": "b", "label": "c"}, {}, r"several columns for 'image': path, file"),
]


@pytest.mark.parametrize(("task", "row", "columns", "message"), COLUMNS)
def test_columns(task: str, row: Any, columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parser(task, columns=columns).parse(1, row)
    assert not isinstance(caught.value, RowError), "no skipping: every row of the file would fail"
    assert "data.jsonl row 1" in str(caught.value) or "data.columns" in str(caught.value)


def test_a_schema_is_for_language_modelling() -> None:
    from qlora_kit.data.task_schemas import TaskRowParser

    section = DataSection.model_validate({"train": "a.jsonl", "schema": "text"})
    with pytest.raises(DataError, match=r"data\.schema is for task\.type causal_lm, not tagging \(got 'text'\)"):
        TaskRowParser(TASKS["tagging"].model_validate({}), section, source("a.jsonl"))


def test_language_modelling_has_another_parser() -> None:
    with pytest.raises(DataError, match=r"task\.type causal_lm has rows of its own.*RowParser"):
        parser("causal_lm")


def test_answers_as_datasets_writes_them_of_different_lengths() -> None:
    row = {"id": "7", "question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": []}}
    with pytest.raises(RowError, match=r"id '7': 1 answers\.text, but 0 answers\.answer_start"):
        parser("question_answering").parse(1, row)


def test_an_image_in_the_row_itself() -> None:
    with pytest.raises(RowError, match=r"image is dict, not text"):
        parser("image_classification").parse(1, {"image": {"bytes": b"", "path": None}, "label": "a"})
