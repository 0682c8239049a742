"""Bootstrap of scores that are no means: additive counts against plain recomputation on the same resampled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qlora_kit.errors import EvalError
from qlora_kit.eval.intervals import bootstrap_mean
from qlora_kit.eval.metrics import ADDITIVE, METRICS, additive_score, compute_metric
from qlora_kit.eval.score_intervals import (
    bootstrap_additive,
    bootstrap_additive_difference,
    bootstrap_score,
    bootstrap_score_difference,
)

ROWS = 30


def _made_up(name: str) -> tuple[list, list, list]:
    """References, and the predictions of two forms: one close, one further off."""
    random = np.random.default_rng(11)

    def noisy(rows: list, share: float, draw: Any) -> list:
        return [[one if random.random() > share else draw() for one in row] for row in rows]

    if name in ("pearson", "spearman"):
        numbers = random.normal(size=ROWS)
        close, far = (numbers + random.normal(scale=scale, size=ROWS) for scale in (0.5, 1.0))
        return numbers.round(1).tolist(), close.round(1).tolist(), far.round(1).tolist()  # some are equal
    vocabulary = {
        "seqeval": ["O", "B-A", "I-A", "B-B", "I-B", "I-C"],
        "bleu": list("abcdefgh"),
        "chrf": ["ab", "bcd", "äc", "ef"],
        "nist": list("abcdefgh"),
    }.get(name, ["x", "y", "z", "rare"])
    length = 8 if name in ("seqeval", "bleu", "chrf", "nist") else 1

    def draw() -> str:
        return vocabulary[min(int(random.exponential(1.5)), len(vocabulary) - 1)]

    true = [[draw() for _ in range(length)] for _ in range(ROWS)]
    a, b = noisy(true, 0.2, draw), noisy(true, 0.5, draw)
    if name == "seqeval":
        return true, a, b
    return [" ".join(row) for row in true], [" ".join(row) for row in a], [" ".join(row) for row in b]


CASES = [
    ("f1", "f1_macro", {}, {"average": "macro"}),
    ("f1", "f1_micro", {}, {"average": "micro"}),
    ("f1", "f1_weighted", {}, {"average": "weighted"}),
    ("matthews", "matthews", {}, {}),
    ("pearson", "pearson", {}, {}),
    ("spearman", "spearman", {}, {}),
    ("seqeval", "f1_micro", {}, {"average": "micro"}),
    ("seqeval", "f1_macro", {}, {"average": "macro"}),
    ("seqeval", "f1_weighted", {}, {"average": "weighted"}),
    ("bleu", "bleu", {}, {}),
    ("chrf", "chrf", {"word_order": 2}, {}),
]


def _plain(name: str, key: str, predictions: list, references: list, options: dict) -> Any:
    def score(index: np.ndarray) -> float:
        rows = {"predictions": [predictions[k] for k in index], "references": [references[k] for k in index]}
        return compute_metric(name, **rows, **options)[key]

    return score


@pytest.mark.parametrize(("name", "key", "options", "additive_options"), CASES)
def test_counts_give_what_recomputing_gives(name: str, key: str, options: dict, additive_options: dict) -> None:
    references, close, far = _made_up(name)
    a, b = (
        additive_score(name, predictions=side, references=references, **options, **additive_options)
        for side in (close, far)
    )
    plain_a, plain_b = (_plain(name, key, side, references, options) for side in (close, far))
    drawn = {"samples": 6, "seed": 4}
    fast, slow = bootstrap_additive(a, **drawn), bootstrap_score(plain_a, ROWS, **drawn)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-9)
    assert fast.low < fast.high
    fast = bootstrap_additive_difference(a, b, **drawn)
    slow = bootstrap_score_difference(plain_a, plain_b, ROWS, **drawn)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-9)
    assert fast.value == pytest.approx(a.value - b.value) and fast.value > 0


def test_every_additive_metric_gives_its_headline() -> None:
    assert {name for name, *_ in CASES} | {"nist"} == set(ADDITIVE)  # nist's weights stay: not what recomputing gives
    for name in ADDITIVE:
        references, close, _ = _made_up(name)
        found = compute_metric(name, predictions=close, references=references)[METRICS[name].headline]
        assert additive_score(name, predictions=close, references=references).value == pytest.approx(found)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_nist_adds_up_to_that_of_nltk(order: int) -> None:
    """Several references, other lengths, a row without words; a resample keeps what n-grams weigh."""
    true, close, far = _made_up("nist")
    several = [[a, *([b] if k % 3 else [])] for k, (a, b) in enumerate(zip(true, far, strict=True))]
    told = [" ".join(text.split()[: k % 9]) for k, text in enumerate(close)]
    score = additive_score("nist", predictions=told, references=several, order=order)
    wanted = compute_metric("nist", predictions=told, references=several, order=order)["nist"]
    assert score.value == pytest.approx(wanted, abs=1e-12) and wanted > 0
    doubled = score.of_sums(2 * np.asarray(score.counts).sum(axis=0, keepdims=True))
    assert doubled[0] == pytest.approx(score.value)
    found = bootstrap_additive(score, samples=50)
    assert found.low < found.value < found.high


def test_nist_of_nothing_said_is_zero() -> None:
    score = additive_score("nist", predictions=["", ""], references=["a b", ["c"]])
    assert score.value == 0 and bootstrap_additive(score, samples=5).high == 0


def test_several_labels_a_row_add_up() -> None:
    random = np.random.default_rng(1)
    references, predictions = random.integers(0, 2, (2, ROWS, 3)).tolist()
    score = additive_score("f1", predictions=predictions, references=references)
    plain = _plain("f1", "f1_macro", predictions, references, {})
    fast, slow = bootstrap_additive(score, samples=12), bootstrap_score(plain, ROWS, samples=12)
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high))


def test_a_mean_scored_anew_is_the_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = bootstrap_score(lambda index: float(values[index].mean()), 50, samples=200, seed=3)
    wanted = bootstrap_mean(values, resamples=200, seed=3)
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))


def test_one_form_with_itself_differs_by_nothing() -> None:
    references, close, _ = _made_up("f1")
    score = additive_score("f1", predictions=close, references=references)
    found = bootstrap_additive_difference(score, score, samples=50)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_pairing_narrows_the_difference() -> None:
    """What makes rows hard is the same for both forms and cancels: alone, each side swings further."""
    random = np.random.default_rng(9)
    true = random.integers(0, 2, 400)
    hard = random.random(400) < 0.4
    close = np.where(hard, 1 - true, true)
    far = np.where(random.random(400) < 0.05, 1 - close, close)
    a, b = (additive_score("f1", predictions=side.tolist(), references=true.tolist()) for side in (close, far))
    paired = bootstrap_additive_difference(a, b, samples=300)
    alone = bootstrap_additive(a, samples=300)
    assert paired.high - paired.low < 0.7 * (alone.high - alone.low)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_nearly_constant_numbers_stay_finite(name: str) -> None:
    """Many a resample of three rows holds one row alone: no correlation there, and 0 is given."""
    score = additive_score(name, predictions=[1e6, 1e6, 1e6 + 1], references=[1.0, 1.0, 2.0])
    found = bootstrap_additive(score, samples=200)
    assert found.value == pytest.approx(1)
    assert (found.low, found.high) == (0, pytest.approx(1))


def test_resampling_many_rows_takes_no_new_scores() -> None:
    """A plain score is asked once a sample and once for all rows; counts are summed once a batch of samples."""
    references, close, _ = _made_up("matthews")
    score = additive_score("matthews", predictions=close * 100, references=references * 100)
    asked = []

    def of_sums(sums: np.ndarray) -> np.ndarray:
        asked.append(len(sums))
        return score.of_sums(sums)

    bootstrap_additive(type(score)(score.counts, of_sums), samples=1000)
    assert sum(asked) == 1001 and len(asked) == 2


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: additive_score("rouge", predictions=["a"], references=["a"]),
            "rouge does not add up .*bleu, chrf, f1",
        ),
        (lambda: additive_score("f1", predictions=["a"], references=["a", "b"]), "different lengths"),
        (lambda: additive_score("f1", predictions=[], references=[]), "no rows"),
        (lambda: additive_score("f1", predictions=["a"], references=[[0]]), "one side has one label a row"),
        (lambda: additive_score("f1", predictions=["a"], references=["a"], average="best"), "macro, micro, weighted"),
        (
            lambda: additive_score("bleu", predictions=["a"], references=["a"], order=3),
            "bleu: the rows cannot be scored",
        ),
        (lambda: bootstrap_score(lambda index: 1.0, 0), "no rows"),
        (lambda: bootstrap_score(lambda index: float("nan"), 5), "score of resampled rows is not finite"),
        (lambda: bootstrap_score(lambda index: 1.0, 5, samples=0), "at least one resample"),
        (lambda: bootstrap_score(lambda index: 1.0, 5, confidence=2), "between 0 and 1"),
        (
            lambda: bootstrap_additive_difference(
                additive_score("f1", predictions=["a"], references=["a"]),
                additive_score("f1", predictions=["a", "b"], references=["a", "b"]),
            ),
            r"different rows \(got \(1, 2\)\)",
        ),
    ],
)
def test_wrong_input_is_named(call: Any, match: str) -> None:
    with pytest.raises(EvalError, match=match):
        call()
