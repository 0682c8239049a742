"""`qlora-kit eval` on tiny runs of tasks: every form, the field's own scores, the same as plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_encoders import write_jsonl
from tiny_task_runs import label_rows, label_run, tiny_bert, train_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_kit.data.report import DataReport
from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.predict import predict
from qlora_kit.eval.results import read_results
from qlora_kit.eval.run import evaluate_run
from qlora_kit.eval.task_rows import held_out_task_rows
from qlora_kit.eval.task_score import interval
from qlora_kit.eval.task_scores import numbers
from qlora_kit.export.run import export_run
from qlora_kit.report import write_report
from qlora_kit.train.restore import load_run_tokenizer, run_task
from qlora_kit.train.run_folder import RunFolder

__all__ = ["label_run", "tiny_bert"]
QUIET = Console(quiet=True)


def test_one_label_a_row(label_run: RunFolder) -> None:
    results = evaluate_run(label_run, QUIET)
    assert list(results.forms) == ["base", "tuned"] and results.rows == 21
    tuned, references = results.forms["tuned"], results.metrics["references"]
    answers = tuned.per_row.answer or []
    expected = [row["label"] for row in label_rows(60)[30:51]]
    assert references == expected and set(answers) <= set(expected)
    assert list(tuned.scores) == ["accuracy", "f1_macro", "f1_micro", "matthews"]
    assert tuned.scores["accuracy"].value == pytest.approx(np.mean([a == b for a, b in zip(answers, expected)]))
    assert tuned.scores["f1_macro"].value == pytest.approx(f1_score(expected, answers, average="macro"))
    assert tuned.scores["matthews"].value == pytest.approx(matthews_corrcoef(expected, answers))
    for score in tuned.scores.values():
        assert score.low <= score.value <= score.high
    assert tuned.loss.value < results.forms["base"].loss.value, "training must have helped"
    assert [pair.metric for pair in results.pairs] == list(tuned.scores)
    assert read_results(label_run.path) == results


def test_answers_are_those_of_plain_transformers(label_run: RunFolder, tiny_bert: Path) -> None:
    tuned = evaluate_run(label_run, QUIET, ["tuned"]).forms["tuned"].per_row
    labels = label_run.manifest()["task"]["labels"]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(model, label_run.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for row, answer, loss in zip(label_rows(60)[30:51], tuned.answer or [], tuned.loss, strict=True):
        with torch.no_grad():
            log_p = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].log_softmax(-1)
        assert labels[int(log_p.argmax())] == answer
        assert loss == pytest.approx(-float(log_p[labels.index(row["label"])]), abs=1e-5)


def test_quantized_merged_and_exported_forms(tmp_path: Path, tiny_bert: Path) -> None:
    held_out = label_rows(60)[30:51]
    run = train_task(
        tmp_path,
        tiny_bert,
        {"type": "classification"},
        label_rows(24),
        held_out,
        base={"quant": "nf4"},
    )
    export_run(run, QUIET, ["fp32"])
    results = evaluate_run(run, QUIET)
    assert list(results.forms) == ["base", "base_nf4", "tuned", "merged", "bundle_fp32"]
    tuned = results.forms["tuned"].per_row
    assert results.forms["base"].per_row.loss != results.forms["base_nf4"].per_row.loss
    for name in ("merged", "bundle_fp32"):
        assert results.forms[name].per_row.loss == pytest.approx(tuned.loss, abs=1e-4)
        assert results.forms[name].per_row.answer == tuned.answer
    pairs = {(pair.a, pair.b, pair.metric): pair for pair in results.pairs}
    assert pairs["bundle_fp32", "tuned", "accuracy"].disagree == 0
    assert pairs["bundle_fp32", "tuned", "matthews"].difference == 0
    assert ("tuned", "base", "f1_macro") in pairs and ("tuned", "base_nf4", "f1_micro") in pairs
    asked = write_jsonl(tmp_path / "in.jsonl", [{"text": row["text"]} for row in held_out])
    for form in ("tuned", "bundle_fp32"):
        predict(run, str(asked), tmp_path / f"{form}.jsonl", QUIET, form=form)
    lines = [(tmp_path / f"{form}.jsonl").read_text().splitlines() for form in ("tuned", "bundle_fp32")]
    for ours, bundles in zip(*(map(json.loads, side) for side in lines), strict=True):
        assert ours.pop("predicted_label") == bundles.pop("predicted_label")
        assert ours.pop("text") == bundles.pop("text")
        assert ours == pytest.approx(bundles, abs=1e-4)


def test_several_labels_a_row(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [row | {"label": [["buy"], ["sell", "wait"], []][k % 3]} for k, row in enumerate(label_rows(40))]
    run = train_task(tmp_path, tiny_bert, {"type": "classification", "multi_label": True}, rows[:24], rows[24:])
    tuned = evaluate_run(run, QUIET, ["tuned"]).forms["tuned"]
    answers, expected = tuned.per_row.answer or [], [row["label"] for row in rows[24:]]
    assert list(tuned.scores) == ["f1_micro", "f1_macro", "exact_match"]
    assert tuned.scores["exact_match"].value == pytest.approx(np.mean([a == b for a, b in zip(answers, expected)]))
    sides = [[[name in row for name in ("buy", "sell", "wait")] for row in side] for side in (expected, answers)]
    assert tuned.scores["f1_micro"].value == pytest.approx(f1_score(*sides, average="micro", zero_division=0))
    asked, output = write_jsonl(tmp_path / "in.jsonl", [{"text": "a sea"}]), tmp_path / "out.jsonl"
    predict(run, str(asked), output, QUIET)
    row = json.loads(output.read_text())
    chosen = [name for name in ("buy", "sell", "wait") if row[f"probability_{name}"] > 0.5]
    assert row["predicted_labels"] == chosen and set(row) == {"text", "predicted_labels"} | {
        f"probability_{name}" for name in ("buy", "sell", "wait")
    }


def test_numbers(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [row | {"label": len(row["text"]) / 10} for row in label_rows(40)]
    run = train_task(tmp_path, tiny_bert, {"type": "regression"}, rows[:24], rows[24:])
    results = evaluate_run(run, QUIET)
    tuned = results.forms["tuned"]
    answers, expected = np.array(tuned.per_row.answer), np.array([row["label"] for row in rows[24:]])
    assert list(tuned.scores) == ["pearson", "spearman", "mse"]
    assert tuned.scores["pearson"].value == pytest.approx(np.corrcoef(answers, expected)[0, 1])
    assert tuned.scores["spearman"].value == pytest.approx(spearmanr(answers, expected).statistic)
    assert tuned.scores["mse"].value == pytest.approx(np.mean((answers - expected) ** 2), rel=1e-5)
    assert tuned.loss.value == pytest.approx(tuned.scores["mse"].value, rel=1e-5), "the loss is the squared error"
    assert {pair.disagree for pair in results.pairs} == {None}
    asked, output = write_jsonl(tmp_path / "in.jsonl", [row for row in rows[24:]]), tmp_path / "out.jsonl"
    predict(run, str(asked), output, QUIET)
    written = [json.loads(line)["predicted_value"] for line in output.read_text().splitlines()]
    assert written == pytest.approx(answers, abs=1e-5)


def test_one_reference_value_leaves_no_correlation() -> None:
    found = numbers([1.0, 2.0], [3.0, 3.0])
    assert list(found.scores) == ["mse"] and interval(found.scores["mse"], 0).value == pytest.approx(2.5)


def test_the_table_and_the_report_show_the_scores(label_run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate_run(label_run, Console(width=200))
    printed = capsys.readouterr().out
    for name in found.forms["tuned"].scores:
        assert name in printed
    value = f"{found.forms['tuned'].scores['matthews'].value:.3f}"
    assert value in printed and value in write_report(label_run.path).read_text(encoding="utf-8")
    assert (label_run.path / "eval" / "results.png").read_bytes().startswith(b"\x89PNG")


SHORT = 17  # tokens: some rows have fewer, some more


def test_rows_held_out_of_the_training_file(tmp_path: Path, tiny_bert: Path) -> None:
    data = {"eval": None, "eval_fraction": 0.3, "max_seq_len": SHORT, "overlong": "skip"}
    run = train_task(tmp_path, tiny_bert, {"type": "classification"}, label_rows(40), [], data=data)
    results = evaluate_run(run, QUIET, ["tuned"])
    by_text = {row["text"]: row["label"] for row in label_rows(40)}
    rows = held_out_task_rows(run.recipe(), run_task(run), load_run_tokenizer(run), None, DataReport([]))
    assert [by_text[row.example.text] for row in rows] == results.metrics["references"] and results.rows == len(rows)
    few = evaluate_run(run, QUIET, ["tuned"], 3)
    assert few.rows == 3 and set(few.metrics["row_hashes"]) < set(results.metrics["row_hashes"])
    assert results.metrics["left_out"] == {str(tmp_path / "rows.jsonl"): {"overlong": 40 - _short_rows(run)}}


def _short_rows(run: RunFolder) -> int:
    tokenizer = load_run_tokenizer(run)
    return sum(len(tokenizer(row["text"])["input_ids"]) <= SHORT for row in label_rows(40))


def test_what_is_not_there(label_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no such form \(got 'bundle_int8'\)\. Allowed: base, tuned\. Export"):
        evaluate_run(label_run, QUIET, ["bundle_int8"])
    untrained = RunFolder(tmp_path / "run")
    untrained.path.mkdir()
    untrained.recipe_file.write_bytes(label_run.recipe_file.read_bytes())
    with pytest.raises(RunError, match="it was never trained"):
        evaluate_run(untrained, QUIET)


def test_the_loss_is_without_class_weights(tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training's held-out loss weighs rows; eval's is the plain cross-entropy, and says so."""
    rows = label_rows(30)
    task = {"type": "classification", "class_weights": {"buy": 10.0, "sell": 1.0, "wait": 1.0}}
    run = train_task(tmp_path, tiny_bert, task, rows[:18], rows[18:])
    results = evaluate_run(run, Console(width=200), ["tuned"])
    assert "the loss here is without task.class_weights" in capsys.readouterr().out
    asked = write_jsonl(tmp_path / "asked.jsonl", rows[18:])
    predict(run, str(asked), tmp_path / "out.jsonl", Console(quiet=True))
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = [-np.log(row[f"probability_{row['label']}"]) for row in told]
    assert results.forms["tuned"].per_row.loss == pytest.approx(plain, rel=1e-3)
    assert run.manifest()["results"]["final_eval_loss"] > 1.5 * np.mean(plain)
