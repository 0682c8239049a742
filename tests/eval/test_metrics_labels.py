"""Scores of labels and numbers against scikit-learn and scipy, and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics import compute_metric

AVERAGES = ("macro", "micro", "weighted")


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", [str, int])
def test_f1_is_that_of_scikit_learn(kind: type, average: str) -> None:
    random = np.random.default_rng(3)
    references = [kind(label) for label in random.integers(0, 12, 60)]
    predictions = [kind(label) for label in random.integers(2, 14, 60)]  # 0 and 1 never predicted, 12 and 13 never true
    found = compute_metric("f1", predictions=predictions, references=references)
    options = {"average": average, "zero_division": 0}
    assert found[f"f1_{average}"] == pytest.approx(f1_score(references, predictions, **options))
    assert found[f"precision_{average}"] == pytest.approx(precision_score(references, predictions, **options))
    assert found[f"recall_{average}"] == pytest.approx(recall_score(references, predictions, **options))
    assert found["f1"] == found["f1_macro"]
    assert list(found["per_label"]) == [str(label) for label in sorted({*references, *predictions})]


def test_f1_by_hand() -> None:
    found = compute_metric("f1", predictions=["a", "b", "c", "b"], references=["a", "b", "b", "ü"])
    assert found["per_label"] == {
        "a": {"precision": 1, "recall": 1, "f1": 1, "support": 1},
        "b": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        "c": {"precision": 0, "recall": 0, "f1": 0, "support": 0},  # never true
        "ü": {"precision": 0, "recall": 0, "f1": 0, "support": 1},  # never predicted
    }
    assert found["f1_macro"] == pytest.approx(1.5 / 4)
    assert found["f1_micro"] == pytest.approx(2 / 4)
    assert found["f1_weighted"] == pytest.approx((1 + 0.5 * 2) / 4)
    assert found["correct"] == [1, 1, 0, 0]


def test_labels_give_the_order_and_a_label_that_does_not_occur_is_left_out() -> None:
    rows = {"predictions": ["neg", "pos"], "references": ["neg", "neg"]}
    found = compute_metric("f1", **rows, labels=["pos", "neutral", "neg"])
    assert list(found["per_label"]) == ["pos", "neg"]
    assert found["f1"] == pytest.approx(compute_metric("f1", **rows)["f1"])


@pytest.mark.parametrize("average", AVERAGES)
def test_f1_of_several_labels_a_row(average: str) -> None:
    random = np.random.default_rng(5)
    references, predictions = random.integers(0, 2, (2, 40, 4))
    predictions[:, 1] = 0  # a label never predicted
    references[:, 3] = predictions[:, 3] = 0  # one that does not occur at all
    labels = ["joy", "anger", "fear", "awe"]
    found = compute_metric("f1", predictions=predictions.tolist(), references=references.tolist(), labels=labels)
    wanted = f1_score(references, predictions, average=average, zero_division=0)
    assert found[f"f1_{average}"] == pytest.approx(wanted)
    assert found["per_label"]["anger"] == {"precision": 0, "recall": 0, "f1": 0, "support": references[:, 1].sum()}
    assert list(found["per_label"]) == labels
    assert found["correct"] == [int((p == t).all()) for p, t in zip(predictions, references, strict=True)]


def test_matthews() -> None:
    random = np.random.default_rng(7)
    references, predictions = random.integers(0, 3, (2, 50)).tolist()
    found = compute_metric("matthews", predictions=predictions, references=references)
    assert found == {"matthews": pytest.approx(matthews_corrcoef(references, predictions))}
    # 2 true positives, 1 true negative, 1 false positive: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1)
    found = compute_metric("matthews", predictions=["y", "y", "y", "n"], references=["y", "y", "n", "n"])
    assert found["matthews"] == pytest.approx(2 / math.sqrt(12))
    assert compute_metric("matthews", predictions=["y", "y"], references=["y", "n"])["matthews"] == 0


def test_correlations() -> None:
    rows = {"predictions": [1, 2, 2, 9.5], "references": [1.0, 2.0, 4.0, 3.0]}
    assert compute_metric("pearson", **rows)["pearson"] == pytest.approx(
        np.corrcoef(rows["predictions"], rows["references"])[0, 1]
    )
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: covariance 3, variances 4.5 and 5
    assert compute_metric("spearman", **rows)["spearman"] == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert spearmanr(*rows.values()).statistic == pytest.approx(3 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_predictions_that_do_not_vary_correlate_with_nothing(name: str) -> None:
    assert compute_metric(name, predictions=[0.1, 0.1, 0.1], references=[1, 2, 3]) == {name: 0.0}


def test_mse() -> None:
    found = compute_metric("mse", predictions=[1, 2.5], references=[3, 2])
    assert found == {"mse": pytest.approx(4.25 / 2), "squared_errors": [4.0, 0.25]}


@pytest.mark.parametrize(
    ("name", "predictions", "references", "options", "match"),
    [
        (
            "f1",
            ["a", "x"],
            ["a", "b"],
            {"labels": ["a", "b"]},
            r"row 1 of predictions .*unknown label \(got 'x'\).*a, b",
        ),
        ("f1", ["a", "a"], ["a", "x"], {"labels": ["a", "b"]}, "row 1 of references .*unknown label"),
        ("f1", [0.5, 1], [0, 1], {}, r"row 0 of predictions is no label \(got 0.5\)"),
        ("f1", [1, math.nan], [0, 1], {}, "row 1 of predictions is no label"),
        ("f1", ["a", None], ["a", "b"], {}, "row 1 of predictions is no label"),
        ("f1", [[0, 1], [1]], [[0, 1], [1, 0]], {}, r"row 1 of predictions has the wrong length \(got 1\).*2"),
        ("f1", [[0, 1]], [[0, 1]], {"labels": ["a"]}, "row 0 of references has the wrong length"),
        ("f1", [[0, 2]], [[0, 1]], {}, "row 0 of predictions is no indicator"),
        ("f1", ["a"], [[0, 1]], {}, "cannot be scored"),
        ("matthews", ["a", "x"], ["a", "b"], {"labels": ["a", "b"]}, "unknown label"),
        ("matthews", [1, 1.5], [1, 2], {}, "row 1 of predictions is no label"),
        ("pearson", [1, math.inf], [1, 2], {}, "row 1 of predictions is no finite number"),
        ("pearson", [1, 2], [3, 3], {}, "all references are the same"),
        ("spearman", [1], [2], {}, "too few rows"),
        ("spearman", [1, 2], [1, None], {}, "row 1 of references is no finite number"),
        ("mse", ["one"], [1], {}, "cannot be scored"),
        ("mse", [math.nan], [1], {}, "row 0 of predictions is no finite number"),
        ("mse", [1, 2], [1], {}, "different lengths"),
        ("f1", [], [], {}, "no rows"),
    ],
)
def test_wrong_input_is_named(name: str, predictions: list, references: list, options: dict, match: str) -> None:
    with pytest.raises(EvalError, match=match):
        compute_metric(name, predictions=predictions, references=references, **options)
