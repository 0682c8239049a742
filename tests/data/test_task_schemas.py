"""Rows of every task become examples, whatever their columns are called."""

from __future__ import annotations

from typing import Any

import pytest
from task_rows import examples_of, parser

from qlora_kit.data.task_examples import Answer, LabelledText, QuestionOnText, SourceTarget, SplitText, TaggedWords
from qlora_kit.task_settings import TASKS

RAW = ("Anna's", "boats", ",", "in", "Porto-Sul", ".")


def parse(row: Any, task: str, **fields: Any) -> Any:
    return parser(task, **fields).parse(1, row)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "t", "label": "a"}, LabelledText("t", None, "a")),
        ({"id": 7, "review": "t", "sentiment": " a "}, LabelledText("t", None, "a")),
        ({"utterance": "t", "intent": 3}, LabelledText("t", None, "3")),
        ({"question": "t", "category": True}, LabelledText("t", None, "true")),
        ({"sentence1": "t", "sentence2": "p", "label": -1}, LabelledText("t", "p", "-1")),
        ({"premise": "t", "hypothesis": "p", "label": "a"}, LabelledText("t", "p", "a")),
        ({"text_a": "t", "text_b": "p", "class": "a"}, LabelledText("t", "p", "a")),
        ({"question1": "t", "question2": "p", "labels": "a"}, LabelledText("t", "p", "a")),
        ({"question": "t", "sentence": "p", "target": "a"}, LabelledText("t", "p", "a")),
    ],
)
def test_classification(row: Any, example: Any) -> None:
    assert parse(row, "classification") == example


@pytest.mark.parametrize(
    ("value", "labels", "name"),
    [
        (1, ["neg", "pos"], "pos"),
        ("1", ["neg", "pos"], "pos"),
        ("neg", ["neg", "pos"], "neg"),
        (1, ["1", "2"], "1"),
        ("2", ["1", "2"], "2"),
        (0, ["none", "0"], "0"),
    ],
)
def test_integer_labels_are_indices_unless_labels_are_integers(value: Any, labels: Any, name: Any) -> None:
    assert parse({"text": "t", "label": value}, "classification", labels=labels).label == name


@pytest.mark.parametrize(
    ("value", "fields", "labels"),
    [
        (["a", "b"], {}, ("a", "b")),
        ([], {}, ()),
        ("", {}, ()),
        ("a, b", {}, ("a", "b")),
        ("a|b,c", {"label_separator": "|"}, ("a", "b,c")),
        ([1, 0], {"labels": ["x", "y"]}, ("y", "x")),
    ],
)
def test_several_labels(value: Any, fields: Any, labels: Any) -> None:
    assert parse({"text": "t", "labels": value}, "classification", multi_label=True, **fields).label == labels


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), (-0.5, -0.5), ("2.5", 2.5), (" 1e-3 ", 0.001)])
def test_regression(value: Any, number: Any) -> None:
    row = {"sentence1": "t", "sentence2": "p", "score": value}
    assert parse(row, "regression") == LabelledText("t", "p", number)


@pytest.mark.parametrize(
    ("row", "fields", "tags"),
    [
        ({"words": ["a", "b"], "tags": ["B-X", "I-X"]}, {}, ("B-X", "I-X")),
        ({"tokens": ["a", "b"], "ner_tags": [1, 0]}, {"labels": ["O", "B-X", "I-X"]}, ("B-X", "O")),
        ({"tokens": ["a", "b"], "labels": ["NN", "I-x"]}, {"scheme": "plain"}, ("NN", "I-x")),
    ],
)
def test_tagging(row: Any, fields: Any, tags: Any) -> None:
    assert parse(row, "tagging", **fields) == TaggedWords(("a", "b"), tags)


def test_broken_spans_are_repaired_and_counted() -> None:
    made = parser("tagging", broken_spans="repair")
    tags = ["I-X", "I-X", "I-Y", "O", "I-Y", "B-Y", "I-Y"]
    example: Any = made.parse(1, {"words": list("abcdefg"), "tags": tags})
    assert example.tags == ("B-X", "I-X", "B-Y", "O", "B-Y", "B-Y", "I-Y")
    assert made.repaired == 3
    made.parse(2, {"words": ["a"], "tags": ["I-X"]})
    assert made.repaired == 4


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["b", "a b"], "answer_start": [2, 0]},
        [{"text": "b", "answer_start": 2}, {"text": "a b", "answer_start": 0}],
    ],
)
def test_question_answering(answers: Any) -> None:
    row = {"id": "7", "title": "T", "context": "a b", "question": "q?", "answers": answers}
    made = parser("question_answering")
    assert made.parse(1, row) == QuestionOnText("q?", "a b", (Answer("b", 2), Answer("a b", 0)), "7")
    assert list(made.ignored_columns) == ["title"]


def test_no_answer_where_that_is_allowed() -> None:
    row = {"context": "a b", "question": "q?", "answers": {"text": [], "answer_start": []}}
    assert parse(row, "question_answering", unanswerable=True) == QuestionOnText("q?", "a b", ())


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"source": "a", "target": "b"}, {}),
        ({"document": "a", "summary": "b", "id": "1"}, {}),
        ({"article": "a", "highlights": "b"}, {}),
        ({"mr": "a", "ref": "b"}, {}),
        ({"translation": {"en": "a", "de": "b"}}, {}),
        ({"translation": {"de": "b", "en": "a"}}, {"source": "translation.en", "target": "translation.de"}),
    ],
)
def test_seq2seq(row: Any, fields: Any) -> None:
    assert parse(row, "seq2seq", columns=fields) == SourceTarget("a", "b")


def test_columns_are_renamed() -> None:
    row = {"body": "t", "text": "other", "kind": "a", "label": "other", "more": "p"}
    made = parser("classification", columns={"text": "body", "label": "kind", "pair": "more"})
    assert made.parse(1, row) == LabelledText("t", "p", "a")
    assert made.schema == "classification (body, kind, more)"
    assert list(made.ignored_columns) == ["text", "label"]


def test_a_named_text_is_no_pair() -> None:
    row = {"sentence1": "t", "sentence2": "p", "label": "a"}
    assert parse(row, "classification", columns={"text": "sentence2"}) == LabelledText("p", None, "a")


@pytest.mark.parametrize(
    ("task", "row", "example"),
    [
        ("classification", {"text": "t"}, LabelledText("t", None, None)),
        ("classification", {"text": "t", "label": None}, LabelledText("t", None, None)),
        ("regression", {"text": "t", "score": "?"}, LabelledText("t", None, None)),
        ("tagging", {"words": ["a"]}, TaggedWords(("a",), None)),
        ("tagging", {"tokens": ["a"], "review": "b"}, TaggedWords(("a",), None)),
        ("tagging", {"text": "Anna's boats, in Porto-Sul."}, SplitText(RAW, None)),
        ("tagging", {"id": 1, "words": "Anna's boats, in Porto-Sul."}, SplitText(RAW, None)),
        ("question_answering", {"id": 3, "question": "q?", "context": "c"}, QuestionOnText("q?", "c", (), "3")),
        ("seq2seq", {"source": "s"}, SourceTarget("s", None)),
        ("seq2seq", {"translation": {"en": "s"}}, SourceTarget("s", None)),
    ],
)
def test_rows_that_are_only_to_be_predicted(task: str, row: Any, example: Any) -> None:
    assert parse(row, task, labelled=False) == example
    named = {"label": "kind"} if "text" in row else {}
    assert parse(row, task, labelled=False, columns=named) == example, "the recipe's columns are those of training"


def test_rows_of_a_csv(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,category\n"two\nlines",0\nb,1\n')
    assert examples_of("classification", path, labels=["no", "yes"]) == [
        LabelledText("two\nlines", None, "no"),
        LabelledText("b", None, "yes"),
    ]


def test_every_task_but_language_modelling_has_rows() -> None:
    from qlora_kit.data.task_columns import ANSWERS, INPUTS

    assert set(INPUTS) == set(ANSWERS) == set(TASKS) - {"causal_lm"}
