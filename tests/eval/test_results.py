"""Evaluation results: statistics per form, paired comparisons, the file, the table and the plot."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.forms import PerRow, compare_forms, score_form
from qlora_kit.eval.results import EvalResults, plot_results, print_table, read_results, write_results


def rows_of(shift: float, right: float, count: int = 80) -> PerRow:
    """Made-up rows: loss about `1 + shift` nats a token, about `right` of the answers right."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, 9, count)
    loss = tokens * (1.0 + shift + random.normal(0, 0.1, count))
    correct = (random.random(count) < right).astype(int).tolist()
    return PerRow(loss.tolist(), tokens.tolist(), correct, ["yes" if hit else "no" for hit in correct])


@pytest.fixture
def results() -> EvalResults:
    forms = {"base": score_form(rows_of(0.5, 0.5), 2.0), "tuned": score_form(rows_of(0.0, 0.9), 3.0)}
    pairs = [compare_forms(forms, "tuned", "base", metric) for metric in ("accuracy", "perplexity", "loss")]
    return EvalResults(80, forms, pairs, {"answer": "choices"}, created="2026-01-01T00:00:00+00:00")


def test_form_statistics_follow_from_its_rows(results: EvalResults) -> None:
    form = results.forms["tuned"]
    rows = form.per_row
    assert form.loss.value == pytest.approx(sum(rows.loss) / sum(rows.loss_tokens))
    assert form.perplexity.value == pytest.approx(math.exp(form.loss.value))
    assert form.accuracy is not None and rows.correct is not None
    assert form.accuracy.value == pytest.approx(sum(rows.correct) / 80)
    assert form.accuracy.low < form.accuracy.value < form.accuracy.high


def test_pairs_say_how_far_apart_and_how_often_they_disagree(results: EvalResults) -> None:
    accuracy, perplexity, loss = results.pairs
    base, tuned = (results.forms[name].per_row for name in ("base", "tuned"))
    assert accuracy.difference == pytest.approx((sum(tuned.correct or []) - sum(base.correct or [])) / 80)
    assert accuracy.low > 0 and loss.high < 0 and perplexity.high < 0
    assert loss.difference == pytest.approx(-0.5)
    assert accuracy.disagree == np.mean([a != b for a, b in zip(base.answer or [], tuned.answer or [], strict=True)])


def test_file_round_trip_and_nothing_beside_it(results: EvalResults, tmp_path: Path) -> None:
    path = write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    tree = json.loads(path.read_text())
    assert tree["format"] == "qlora-eval/1"
    assert set(tree["forms"]["base"]) == {"loss", "perplexity", "accuracy", "rows", "seconds", "per_row"}
    assert set(tree["pairs"][0]) == {"a", "b", "metric", "difference", "low", "high", "disagree"}


def test_a_failed_write_leaves_the_old_file(results: EvalResults, tmp_path: Path) -> None:
    path = write_results(tmp_path, results)
    before = path.read_bytes()
    broken = replace(results, forms={"base": replace(results.forms["base"], seconds=math.nan)})
    with pytest.raises(EvalError, match="not finite"):
        write_results(tmp_path, broken)
    assert path.read_bytes() == before


def test_forms_without_answers(results: EvalResults, tmp_path: Path) -> None:
    forms = {name: score_form(PerRow([1.0, 2.0], [1, 2]), 1.0) for name in ("base", "tuned")}
    pair = compare_forms(forms, "tuned", "base", "loss")
    assert pair.disagree is None
    write_results(tmp_path, EvalResults(2, forms, [pair]))
    assert read_results(tmp_path).forms["base"].accuracy is None
    assert "accuracy" not in printed(EvalResults(2, forms, [pair]))
    with pytest.raises(EvalError, match="answers were not checked"):
        compare_forms(forms, "tuned", "base", "accuracy")


def printed(results: EvalResults) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_table(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_shows_every_form_with_intervals(results: EvalResults) -> None:
    text = printed(results)
    form = results.forms["tuned"]
    assert f"{form.perplexity.value:.2f} [{form.perplexity.low:.2f}, {form.perplexity.high:.2f}]" in text
    assert "tuned - base" in text and "accuracy (points)" in text and "% of rows" in text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_few_rows_have_no_interval(count: int) -> None:
    forms = {name: score_form(rows_of(0.1 * k, 0.5, count), 1.0) for k, name in enumerate(("base", "tuned"))}
    text = printed(EvalResults(count, forms, [compare_forms(forms, "tuned", "base", "perplexity")]))
    perplexity = forms["tuned"].perplexity
    if count == 3:
        assert f"{perplexity.value:.2f} [{perplexity.low:.2f}, " in text
        return
    assert f"{perplexity.value:.2f} - " in text and "[" not in text and "(may be 0)" in text


def test_plot_is_a_png(results: EvalResults, tmp_path: Path) -> None:
    path = plot_results(results, tmp_path / "eval.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no forms"):
        plot_results(EvalResults(0, {}), tmp_path / "eval.png")


def test_lengths_are_checked() -> None:
    with pytest.raises(EvalError, match="correct: 1 values for 2 rows"):
        score_form(PerRow([1.0, 2.0], [1, 1], correct=[1]), 1.0)


def test_an_unknown_form_is_named(results: EvalResults) -> None:
    with pytest.raises(EvalError, match=r"no form merged among the results\. Allowed: base, tuned"):
        compare_forms(results.forms, "merged", "base", "loss")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no evaluation"),
        ("{", "damaged"),
        ('{"format": "other/1"}', "not of the format qlora-eval/1"),
        ('{"format": "qlora-eval/1"}', "damaged: KeyError"),
        ("[]", "not of the format"),
    ],
)
def test_reading_a_damaged_file(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "results.json").write_text(text)
    with pytest.raises(RunError, match=match):
        read_results(tmp_path)


def test_writing_needs_a_run_folder(results: EvalResults, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        write_results(tmp_path / "none", results)
