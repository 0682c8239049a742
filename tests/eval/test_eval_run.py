"""`qlora-kit eval` on a tiny run: every form, every kind of answer, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import changed_copy, label_rows, write_rows

from qlora_kit.errors import DataError, EvalError
from qlora_kit.eval.results import EvalResults, read_results
from qlora_kit.eval.run import evaluate_run
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)
ALL = ["base", "base_nf4", "tuned", "merged", "bundle_fp32"]


@pytest.fixture
def evaluated(exported_run: Path, tmp_path: Path) -> Any:
    """Evaluates a copy of the exported run, with changes to its recipe."""

    def run(only: list[str] | None = None, max_rows: int | None = None, **sections: dict[str, Any]) -> EvalResults:
        target = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return evaluate_run(RunFolder(changed_copy(exported_run, target, **sections)), QUIET, only, max_rows)

    return run


def test_all_forms_with_choices(evaluated: Any, tmp_path: Path) -> None:
    results = evaluated()
    assert list(results.forms) == ALL and results.rows == 12
    base, nf4, tuned, merged, bundle = (results.forms[name] for name in ALL)
    assert base.per_row.loss != nf4.per_row.loss, "the quantized base must differ from the base"
    assert tuned.loss.value < 0.7 * nf4.loss.value, "training must have helped"
    for made in (merged, bundle):
        assert made.per_row.loss == pytest.approx(tuned.per_row.loss, rel=1e-4)
        assert made.per_row.answer == tuned.per_row.answer
    assert {name for form in results.forms.values() for name in form.per_row.answer} <= {"good", "bad"}
    expected = [row["completion"] for row in label_rows(60)[48:]]
    right = [int(given == wanted) for given, wanted in zip(tuned.per_row.answer, expected, strict=True)]
    assert tuned.per_row.correct == right and tuned.accuracy.value == pytest.approx(sum(right) / 12)
    pairs = {(pair.a, pair.b): pair for pair in results.pairs}
    assert set(pairs) == {("tuned", "base"), ("tuned", "base_nf4"), ("merged", "tuned"), ("bundle_fp32", "tuned")}
    assert pairs["bundle_fp32", "tuned"].disagree == 0
    folder = tmp_path / "run0"
    assert read_results(folder) == results
    assert (folder / "eval" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_choices_are_found_in_the_training_rows(evaluated: Any) -> None:
    found = evaluated(["tuned"], eval={"choices": []})
    assert found.metrics["choices"] == ["bad", "good"]
    assert found.forms["tuned"].per_row == evaluated(["tuned"]).forms["tuned"].per_row


def test_a_completion_outside_the_choices_names_the_row(evaluated: Any) -> None:
    with pytest.raises(EvalError, match=r"eval\.jsonl row 1: the completion is none of eval\.choices \(got 'bad'\)"):
        evaluated(["tuned"], eval={"choices": ["good", "fine"]})


def test_numbers_in_generated_answers(evaluated: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "how many?", "completion": f"so it is #### {k}"} for k in range(3)]
    results = evaluated(
        ["tuned", "bundle_fp32"],
        data={"eval": str(write_rows(tmp_path / "numbers.jsonl", rows))},
        eval={"answer": "number", "choices": []},
    )
    tuned, bundle = results.forms["tuned"].per_row, results.forms["bundle_fp32"].per_row
    assert tuned.correct == [0, 0, 0] and len(tuned.answer) == 3 and all(tuned.answer)
    assert bundle.answer == tuned.answer, "greedy answers of bundle and reference are the same"


def test_exact_answers(evaluated: Any, tmp_path: Path) -> None:
    said = evaluated(["tuned"], eval={"answer": "exact", "choices": []}).forms["tuned"].per_row.answer
    prompts = [row["prompt"] for row in label_rows(60)[48:]]
    rows = [{"prompt": prompts[0], "completion": said[0]}, {"prompt": prompts[1], "completion": said[1] + "x"}]
    results = evaluated(
        ["tuned", "merged"],
        data={"eval": str(write_rows(tmp_path / "exact.jsonl", rows))},
        eval={"answer": "exact", "choices": []},
    )
    for form in results.forms.values():
        assert form.per_row.correct == [1, 0] and form.accuracy.value == 0.5


def test_perplexity_alone_where_nothing_is_asked(evaluated: Any) -> None:
    results = evaluated(["base", "tuned"], eval={"answer": "none", "choices": []})
    tuned = results.forms["tuned"]
    assert tuned.accuracy is None and tuned.per_row.correct is None and tuned.per_row.answer is None
    choices = evaluated(["tuned"]).forms["tuned"]
    assert tuned.per_row.loss == pytest.approx(choices.per_row.loss, rel=1e-5), "the same tokens carry the loss"
    assert [pair.metric for pair in results.pairs] == ["perplexity"]


def test_plain_text(evaluated: Any, tmp_path: Path) -> None:
    rows = [{"text": "The bridge was built of stone."}, {"text": "Bread, salt, lamp oil, rope."}]
    data = {"eval": str(write_rows(tmp_path / "text.jsonl", rows)), "schema": None}
    results = evaluated(["merged", "bundle_fp32"], data=data, eval={"answer": "none", "choices": []})
    merged, bundle = results.forms["merged"].per_row, results.forms["bundle_fp32"].per_row
    assert min(merged.loss_tokens) > 5 and bundle.loss == pytest.approx(merged.loss, rel=1e-4)
    with pytest.raises(DataError, match=r"plain text asks nothing.*eval\.answer: none"):
        evaluated(["merged"], data=data)


def test_at_most_so_many_rows(evaluated: Any) -> None:
    by_option = evaluated(["merged"], 5)
    assert by_option.rows == len(by_option.forms["merged"].per_row.loss) == 5
    assert evaluated(["merged"], eval={"max_rows": 5}).forms["merged"].per_row == by_option.forms["merged"].per_row


def test_a_sample_is_the_same_whatever_is_asked(evaluated: Any) -> None:
    asked = evaluated(["merged"], 5).forms["merged"].per_row
    plain = evaluated(["merged"], 5, eval={"answer": "none", "choices": []}).forms["merged"].per_row
    assert plain.loss == pytest.approx(asked.loss, rel=1e-5) and plain.loss_tokens == asked.loss_tokens
    every = evaluated(["merged"]).forms["merged"].per_row
    assert asked.loss != pytest.approx(every.loss[:5], rel=1e-5), "the first rows are no sample"


@pytest.mark.parametrize("answer", ["choices", "none"])
@pytest.mark.parametrize("own_file", [True, False])
def test_rows_left_out_are_told_and_stored(
    exported_run: Path, tmp_path: Path, answer: str, own_file: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "long " * 200, "completion": "good"}
    rows = str(write_rows(tmp_path / "rows.jsonl", [*label_rows(12), long, long]))
    data = {"eval": rows} if own_file else {"train": rows, "eval": None, "eval_fraction": 0.3}
    checked = {"answer": answer, "choices": ["good", "bad"] if answer == "choices" else []}
    run = changed_copy(exported_run, tmp_path / "run", data=data, eval=checked)
    found = evaluate_run(RunFolder(run), Console(width=500), ["merged"])
    assert f"{rows}: 2 rows left out (overlong)" in capsys.readouterr().out
    assert found.metrics["left_out"] == read_results(run).metrics["left_out"] == {rows: {"overlong": 2}}


def test_the_compute_dtype_is_scored_where_asked(evaluated: Any) -> None:
    exact, rounded = evaluated(["tuned"]), evaluated(["tuned"], eval={"dtype": "compute"})
    assert rounded.forms["tuned"].per_row.loss != exact.forms["tuned"].per_row.loss
    assert rounded.forms["tuned"].loss.value == pytest.approx(exact.forms["tuned"].loss.value, rel=0.05)


def test_forms_that_are_not_there(trained_run: Path, tmp_path: Path) -> None:
    run = RunFolder(changed_copy(trained_run, tmp_path / "run"))
    with pytest.raises(
        EvalError, match=r"no such form \(got 'bundle_int8'\)\. Allowed: base, base_nf4, tuned\. Export"
    ):
        evaluate_run(run, QUIET, ["bundle_int8"])
    assert not (run.path / "eval").exists()


def test_rejected_and_unfinished_bundles_are_no_forms(exported_run: Path, tmp_path: Path) -> None:
    run = RunFolder(changed_copy(exported_run, tmp_path / "run"))
    (run.bundles / "fp32").rename(run.bundles / "fp32.rejected")
    (run.bundles / ".partial-int8").mkdir()
    (run.bundles / ".partial-int8" / "manifest.json").write_text("{}")
    with pytest.raises(EvalError, match=r"Allowed: base, base_nf4, tuned, merged\."):
        evaluate_run(run, QUIET, ["bundle_fp32"])


def test_a_damaged_bundle_is_named(exported_run: Path, tmp_path: Path) -> None:
    run = RunFolder(changed_copy(exported_run, tmp_path / "run"))
    with (run.bundles / "fp32" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(EvalError, match=r"bundles/fp32: .*tokenizer\.json.*Export again"):
        evaluate_run(run, QUIET, ["bundle_fp32"])


def test_results_hold_only_finite_json(evaluated: Any, tmp_path: Path) -> None:
    evaluated(["merged"])
    text = (tmp_path / "run0" / "eval" / "results.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["format"] == "qlora-eval/1"
