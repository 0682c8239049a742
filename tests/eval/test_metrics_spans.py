"""Scores of BIO spans: by hand, and as the seqeval library gives them."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import classification_report, f1_score

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.metrics.seqeval import span_report

REFERENCES = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"], ["O"], []]
PREDICTIONS = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG", "O"], ["O"], []]


def test_spans_by_hand() -> None:
    """PER is right; LOC is taken for ORG; ORG ends one word early."""
    found = compute_metric("seqeval", predictions=PREDICTIONS, references=REFERENCES)
    assert (found["precision"], found["recall"], found["f1"]) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    )
    assert found["f1_macro"] == pytest.approx(1 / 3)
    assert found["per_type"] == {
        "LOC": {"precision": 0, "recall": 0, "f1": 0, "support": 1},
        "ORG": {"precision": 0, "recall": 0, "f1": 0, "support": 1},
        "PER": {"precision": 1, "recall": 1, "f1": 1, "support": 1},
    }
    assert found["correct"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("predicted", "true", "right"),
    [
        (["O", "I-X", "I-X"], ["O", "B-X", "I-X"], 1),  # I- after O starts a span
        (["B-X", "I-Y", "O"], ["B-X", "B-Y", "O"], 1),  # and so does a change of type
        (["B-X", "B-X"], ["B-X", "I-X"], 0),  # two spans are not one
        (["B-X-y", "I-X-y"], ["B-X-y", "I-X-y"], 1),  # a type with a hyphen
        (["B-Straße", "O"], ["B-Straße", "I-Straße"], 0),
    ],
)
def test_broken_sequences(predicted: list[str], true: list[str], right: int) -> None:
    assert compute_metric("seqeval", predictions=[predicted], references=[true])["correct"] == [right]


@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_averages_are_those_of_seqeval(average: str) -> None:
    random = np.random.default_rng(2)
    tags = np.array(["O", "B-A", "I-A", "B-B", "I-B", "I-C"])  # broken sequences on purpose
    references = [random.choice(tags, length).tolist() for length in random.integers(1, 9, 40)]
    predictions = [[tag if random.random() < 0.7 else str(random.choice(tags)) for tag in row] for row in references]
    found = compute_metric("seqeval", predictions=predictions, references=references)
    assert found[f"f1_{average}"] == pytest.approx(f1_score(references, predictions, average=average))
    assert 0 < found[f"f1_{average}"] < 1


def test_no_span_anywhere_scores_zero_and_every_row_is_right() -> None:
    found = compute_metric("seqeval", predictions=[["O", "O"]], references=[["O", "O"]])
    assert (found["f1"], found["per_type"], found["correct"]) == (0, {}, [1])


def test_report_is_the_table_of_seqeval() -> None:
    report = span_report(PREDICTIONS, REFERENCES, digits=3)
    assert report == classification_report(REFERENCES, PREDICTIONS, digits=3, zero_division=0)
    rows = [line.split() for line in report.splitlines() if line.strip()]
    assert rows[0] == ["precision", "recall", "f1-score", "support"]
    assert ["PER", "1.000", "1.000", "1.000", "1"] in rows
    assert ["micro", "avg", "0.333", "0.333", "0.333", "3"] in rows


@pytest.mark.parametrize(
    ("predictions", "references", "match"),
    [
        ([["O"]], [["O", "O"]], r"row 0 has another number of predicted tags than of words \(got \(1, 2\)\)"),
        ([["O"], ["PER"]], [["O"], ["O"]], r"row 1 of predictions has a tag that is not BIO \(got 'PER'\)"),
        ([["O"]], [["B-"]], "row 0 of references has a tag that is not BIO"),
        ([["O"], [None]], [["O"], ["O"]], "row 1 of predictions has a tag that is not BIO"),
        ([[3]], [["O"]], "cannot be scored"),
        ([["O"]], [["O"], ["O"]], "different lengths"),
        ([], [], "no rows"),
    ],
)
def test_wrong_tags_are_named(predictions: list, references: list, match: str) -> None:
    with pytest.raises(EvalError, match=match):
        compute_metric("seqeval", predictions=predictions, references=references)


def test_a_report_needs_spans() -> None:
    with pytest.raises(EvalError, match="no span to report on"):
        span_report([["O"]], [["O"]])
