"""Names of labels, their weights, and a split that keeps their shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from qlora_kit.data.examples import RowError, split_key
from qlora_kit.data.task_examples import LabelledImage, LabelledText, QuestionOnText, TaggedWords
from qlora_kit.data.task_labels import (
    LabelCounts,
    check_label,
    class_weights,
    collect_labels,
    names_of,
    strata,
    stratified_mask,
)
from qlora_kit.errors import DataError
from qlora_kit.task_settings import TASKS, ClassificationSettings

CLASSIFICATION = ClassificationSettings()


def texts(*labels: Any) -> list[LabelledText]:
    return [LabelledText(f"text {k}", None, label) for k, label in enumerate(labels)]


def tagged(*tags: str) -> TaggedWords:
    return TaggedWords(("w",) * len(tags), tags)


def test_labels_are_sorted() -> None:
    assert collect_labels(texts("b", "a", "b", None), CLASSIFICATION) == ["a", "b"]
    several = ClassificationSettings(multi_label=True)
    assert collect_labels(texts(("c", "a"), (), ("b",)), several) == ["a", "b", "c"]
    images = [LabelledImage("1.png", "dog"), LabelledImage("2.png", "cat")]
    assert collect_labels(images, TASKS["image_classification"].model_validate({})) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("scheme", "labels"),
    [
        ("bio", ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]),
        ("plain", ["O", "B-LOC", "B-PER", "I-PER"]),
    ],
)
def test_tags_have_o_first(scheme: str, labels: list[str]) -> None:
    settings = TASKS["tagging"].model_validate({"scheme": scheme})
    assert collect_labels([tagged("B-PER", "I-PER", "O"), tagged("B-LOC")], settings) == labels


def test_examples_without_labels_have_no_names() -> None:
    assert names_of(QuestionOnText("q", "c", ())) == names_of(LabelledText("t", None, 3.5)) == ()
    assert names_of(TaggedWords(("w",), None)) == ()


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    names = ["a"] * 7 + ["b"] * 2 + ["c"]
    wanted = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=np.array(names))
    np.testing.assert_allclose(class_weights("balanced", names, ["a", "b", "c"]), wanted)
    assert class_weights("balanced", names, ["a", "b", "c", "unseen"])[3] == 1


def test_named_weights_and_none() -> None:
    assert class_weights({"b": 3.0}, [], ["a", "b"]).tolist() == [1, 3]
    assert class_weights("none", ["a"], ["a", "b"]).tolist() == [1, 1]


def test_a_stratified_split_keeps_shares_and_parts_no_equal_texts() -> None:
    labels = ["often"] * 900 + ["seldom"] * 90 + ["twice"] * 2 + ["once"]
    examples = [LabelledText(f"text {k // 3 if k < 900 else k}", None, label) for k, label in enumerate(labels)]
    keys = np.array([split_key(example, 1) for example in examples], dtype=np.uint64)
    mask = stratified_mask(keys, strata(examples), 0.1)
    held_out = [label for label, held in zip(labels, mask) if held]
    assert held_out.count("seldom") == 9 and abs(held_out.count("often") - 90) <= 1
    assert held_out.count("twice") == 1 and held_out.count("once") == 0
    assert not set(keys[mask].tolist()) & set(keys[~mask].tolist())
    again = np.random.default_rng(0).permutation(len(keys))
    assert (stratified_mask(keys[again], [labels[k] for k in again], 0.1) == mask[again]).all(), "order plays no part"
    other = np.array([split_key(example, 2) for example in examples], dtype=np.uint64)
    assert (stratified_mask(other, labels, 0.1) != mask).any(), "another seed holds out other rows"


def test_a_text_with_two_labels_stays_on_one_side() -> None:
    keys = np.array([5, 5, 1, 9, 7], dtype=np.uint64)
    assert stratified_mask(keys, ["a", "b", "a", "a", "b"], 0.3).tolist() == [False, False, True, False, False]


def test_rare_labels_and_tags_are_what_is_shared_out() -> None:
    assert strata(texts(("a", "b"), ("a",), (), ("a", "c"), ("b", "a"))) == ["b", "a", "", "c", "b"]
    assert strata([tagged("O", "B-X"), tagged("O")]) == ["B-X", "O"]


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        (texts("a", "a"), {}, r"have 1 labels: nothing to tell apart \(got \['a'\]\)\. Allowed: at least two"),
        (texts(None), {}, r"have 0 labels.*data\.columns"),
        ([tagged("O", "O")], None, r"have 1 tags: nothing to tell apart \(got \['O'\]\)"),
    ],
)
def test_too_few_labels(examples: Any, settings: Any, message: str) -> None:
    made = TASKS["tagging"].model_validate({}) if settings is None else CLASSIFICATION
    with pytest.raises(DataError, match=message):
        collect_labels(examples, made)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "postive",
            ["negative", "positive"],
            r"label has 'postive'.*Allowed: negative, positive\. Did you mean 'positive'",
        ),
        ("NEG", ["neg", "pos"], r"Did you mean 'neg'\?"),
        ("xyz", ["neg", "pos"], r"not among the labels\. Allowed: neg, pos\. Add it to task\.labels"),
        ("no", [f"label {k}" for k in range(77)], r"label 9 and 67 more"),
    ],
)
def test_unknown_labels_name_close_ones(name: str, labels: list[str], message: str) -> None:
    with pytest.raises(RowError, match=message):
        check_label(name, labels, "label")


def test_weights_for_no_label() -> None:
    with pytest.raises(DataError, match=r"task\.class_weights names no label \(got \['c'\]\)\. Allowed: a, b"):
        class_weights({"a": 1.0, "c": 2.0}, [], ["a", "b"])


def test_nothing_to_hold_out() -> None:
    keys = np.array([1, 1, 2], dtype=np.uint64)
    with pytest.raises(DataError, match=r"3 usable rows, and no label has two different texts.*set data\.eval"):
        stratified_mask(keys, ["a", "a", "b"], 0.5)


def test_labels_that_may_be_slips_are_doubted() -> None:
    counts = LabelCounts()
    for k, label in enumerate(["Card lost", "card_lost", "Card lost", "C", "C++", "C", "C++", "-1", "1", "1", "-1"], 1):
        counts.add(LabelledText("text", None, label), f"rows.csv row {k}")
    alike, single = counts.doubts()
    assert alike == "are these labels one? 'Card lost' (2 rows, first rows.csv row 1) and 'card_lost' (rows.csv row 2)"
    assert single == "labels of one row alone: 'card_lost' (rows.csv row 2)"


def test_types_of_spans_are_doubted_and_their_marks_are_not() -> None:
    counts = LabelCounts()
    for k in range(2):
        counts.add(TaggedWords(("a", "b", "c"), ("B-per", "I-per", "O")), f"row {k + 1}")
    assert not counts.doubts()
    counts.add(TaggedWords(("a",), ("B-PER",)), "row 3")
    assert counts.doubts()[0] == "are these labels one? 'PER' (row 3) and 'per' (2 rows, first row 1)"


def test_where_every_label_is_single_none_is_doubted() -> None:
    counts = LabelCounts()
    for label in ("a", "b"):
        counts.add(LabelledText("text", None, label), "row")
    assert not counts.doubts()
