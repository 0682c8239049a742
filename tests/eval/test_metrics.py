"""The metric modules: what they count, that they need no network, and that evaluate accepts them as scripts."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from decimal import Decimal
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics import METRICS, compute_metric, load_metric
from qlora_kit.eval.metrics.last_number import last_number


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(("predictions", "references"), [(["a", "b", "c"], ["a", "b", "b"]), ([0, 1, 2], [0, 1, 1])])
def test_accuracy(predictions: list, references: list) -> None:
    found = compute_metric("accuracy", predictions=predictions, references=references)
    assert found == {"accuracy": pytest.approx(2 / 3), "correct": [1, 1, 0]}


def test_exact_match_strips_and_keeps_case_unless_told() -> None:
    rows = {"predictions": [" Paris\n", "paris", "Lyon"], "references": ["Paris", "Paris", "Paris"]}
    assert compute_metric("exact_match", **rows)["correct"] == [1, 0, 0]
    assert compute_metric("exact_match", **rows, ignore_case=True)["correct"] == [1, 1, 0]
    several = {"predictions": ["b", "c"], "references": [["a", " b"], ["a", "b"]]}
    assert compute_metric("exact_match", **several)["correct"] == [1, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", "7"),
        ("#### 1,234.", "1234"),
        ("so #### $12.50", "12.5"),
        ("12 apples #### -3", "-3"),
        ("#### 8\nQuestion: 9 plus 9? #### 18", "8"),
        ("####\nthe answer is 5", "5"),
        ("#### none of the 4", "4"),
        ("It costs $1,234,567.89", "1234567.89"),
        ("The result is 42.", "42"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("a loss of −7 degrees", "-7"),
        ("count: 10-3", "3"),
        ("what is 10 - 3", "3"),
        ("covid-19", "19"),
        ("1,2,3", "3"),
        ("about 50%", "50"),
        ("roughly .5", "0.5"),
        ("5.0", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_last_number_metric_counts_rows_without_a_number_as_wrong() -> None:
    found = compute_metric(
        "last_number", predictions=["so 1,000", "hm", "6"], references=["#### 1000", "#### 2", "#### 7"]
    )
    assert found == {"last_number": pytest.approx(1 / 3), "correct": [1, 0, 0]}


def test_perplexity_weighs_tokens() -> None:
    found = compute_metric("perplexity", loss=[10.0, 1.0], loss_tokens=[10, 4])
    assert found == {"perplexity": pytest.approx(math.exp(11 / 14)), "loss": pytest.approx(11 / 14), "loss_tokens": 14}


COLUMNS: dict[str, dict[str, list]] = {
    "perplexity": {"loss": [1.0, 2.0], "loss_tokens": [2, 3]},
    "last_number": {"predictions": ["1", "2"], "references": ["1", "3"]},
    "seqeval": {"predictions": [["B-X"], ["O"]], "references": [["B-X"], ["B-Y"]]},
    **{name: {"predictions": [1.0, 2.0], "references": [1.0, 3.0]} for name in ("mse", "pearson", "spearman")},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_its_headline_offline_in_plain_numbers(name: str) -> None:
    found = compute_metric(name, **COLUMNS.get(name, {"predictions": ["a b", "c d"], "references": ["a b", "c e"]}))
    assert isinstance(found[METRICS[name].headline], float)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_columns_may_be_arrays() -> None:
    rows = {"predictions": np.array([0, 1, 2]), "references": np.array([0, 1, 1])}
    assert compute_metric("accuracy", **rows)["correct"] == compute_metric("f1", **rows)["correct"] == [1, 1, 0]


def test_batches_add_up() -> None:
    metric = load_metric("exact_match")
    metric.add_batch(predictions=["a"], references=["a"])
    metric.add_batch(predictions=["b", "c"], references=["b", "d"])
    assert metric.compute()["correct"] == [1, 1, 0]


@pytest.mark.parametrize(
    ("name", "inputs", "match"),
    [
        (
            "gleu",
            {"predictions": ["a"], "references": ["a"]},
            "Allowed: accuracy, bleu, cer, .*perplexity",
        ),
        ("accuracy", {"predictions": [], "references": []}, "no rows"),
        ("accuracy", {}, "no rows"),
        ("accuracy", {"predictions": ["a", "b"], "references": ["a"]}, "different lengths"),
        ("exact_match", {"predictions": [1], "references": ["a"]}, "cannot be scored"),
        ("exact_match", {"predictions": ["a"]}, "cannot be scored"),
        ("exact_match", {"predictions": ["a", "b"], "references": [["a"], []]}, "row 1 has no reference"),
        ("last_number", {"predictions": ["1"], "references": ["one"]}, "reference 0 holds no number"),
        ("perplexity", {"loss": [1.0, math.inf], "loss_tokens": [1, 1]}, "row 1 is not finite"),
        ("perplexity", {"loss": [0.0], "loss_tokens": [0]}, "no tokens carry loss"),
    ],
)
def test_wrong_input_is_named(name: str, inputs: dict, match: str) -> None:
    with pytest.raises(EvalError, match=match):
        compute_metric(name, **inputs)


def test_evaluate_loads_every_module_without_a_hub(tmp_path: Path) -> None:
    """In a process of its own, with a fresh home and evaluate's own settings: online, yet no socket is opened."""
    folder = resources.files("qlora_kit.eval.metrics")
    script = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import evaluate\n"
        f"for name in {list(METRICS)}:\n"
        f"    print(evaluate.load(r'{folder}/' + name + '.py', keep_in_memory=True).name)\n"
    )
    hub = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in hub} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(METRICS)
