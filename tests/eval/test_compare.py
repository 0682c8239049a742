"""`qlora-kit compare`: runs side by side, in pairs where their rows are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_run import changed_copy

from qlora_kit.cli import main
from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.compare import compare_runs
from qlora_kit.eval.harness.results import Metric, TaskScore, merge_benchmarks
from qlora_kit.eval.run import evaluate_run
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def evaluated(exported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = changed_copy(exported_run, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate_run(RunFolder(run), QUIET, ["base_nf4", "tuned"])
    return run


@pytest.fixture
def two(evaluated: Path, tmp_path: Path) -> list[Path]:
    """The run and a copy; whatever one test changes is not seen by another."""
    return [changed_copy(evaluated, tmp_path / name) for name in ("first", "second")]


def add_benchmark(run: Path, rows: list[float], **changes: Any) -> None:
    value = sum(rows) / len(rows)
    fields: dict[str, Any] = {
        "metrics": {"acc": Metric(value, value - 0.1, value + 0.1, True, True)},
        "rows": len(rows),
        "rows_in_all": 100,
        "few_shot": 0,
        "version": "1",
        "source": "local files",
        "fingerprint": "abc",
        "adapter": None,
        "tools": {},
        "per_row": {"acc": rows},
    }
    merge_benchmarks(run, {"tuned": {"gsm8k": TaskScore(**{**fields, **changes})}}, None)


def results(run: Path, change: Any) -> None:
    """Changes RUN/eval/results.json."""
    path = run / "eval" / "results.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_alike_runs_differ_in_nothing(two: list[Path]) -> None:
    found = compare_runs(two)
    assert [run.name for run in found.runs] == ["first", "second"] and not found.not_comparable
    assert {(pair.a, pair.b, pair.metric) for pair in found.pairs} == {
        (f"second:{form}", f"first:{form}", metric)
        for form in ("base_nf4", "tuned")
        for metric in ("accuracy", "loss", "perplexity")
    }
    assert all(pair.difference == pair.low == pair.high == 0 and pair.rows == 12 for pair in found.pairs)
    facts = found.runs[0].facts
    manifest = RunFolder.open(two[0]).manifest()
    assert facts["trainable parameters"] == manifest["results"]["trainable_params"] > 0
    sizes = sum(file.stat().st_size for file in (two[0] / "bundles" / "fp32").rglob("*") if file.is_file())
    assert facts["bundle fp32, bytes"] == sizes > 0


def test_a_difference_is_found(two: list[Path]) -> None:
    def worse(tree: Any) -> None:
        tree["forms"]["tuned"]["per_row"]["loss"] = [x + 1 for x in tree["forms"]["tuned"]["per_row"]["loss"]]

    results(two[1], worse)
    [pair] = [p for p in compare_runs(two).pairs if (p.a, p.metric) == ("second:tuned", "loss")]
    tokens = RunFolder.open(two[0]).path / "eval" / "results.json"
    per_row = json.loads(tokens.read_text())["forms"]["tuned"]["per_row"]
    assert pair.difference == pytest.approx(12 / sum(per_row["loss_tokens"])) and pair.low > 0


def test_other_rows_are_said_and_not_paired(two: list[Path]) -> None:
    folder = RunFolder.open(two[1])
    data = folder.manifest()["data"]
    data["eval"]["fingerprint"] = "sha256:other"
    folder.update_manifest(data=data)
    found = compare_runs(two)
    assert not found.pairs and found.not_comparable == ["held-out rows: second and first: other data"]


def test_another_tokenizer_leaves_accuracy(two: list[Path]) -> None:
    def longer(tree: Any) -> None:
        for form in tree["forms"].values():
            form["per_row"]["loss_tokens"] = [n + 1 for n in form["per_row"]["loss_tokens"]]

    results(two[1], longer)
    found = compare_runs(two)
    assert {pair.metric for pair in found.pairs} == {"accuracy"}
    assert found.not_comparable == ["held-out rows, loss: second and first make other tokens of the same rows"]


def test_other_choices_leave_loss(two: list[Path]) -> None:
    results(two[1], lambda tree: tree["metrics"].update(choices=["good", "bad", "fine"]))
    found = compare_runs(two)
    assert {pair.metric for pair in found.pairs} == {"loss", "perplexity"}
    assert found.not_comparable == ["held-out rows, accuracy: second and first: other eval.answer or eval.choices"]


def test_other_numbers_of_rows(two: list[Path], exported_run: Path, tmp_path: Path) -> None:
    few = changed_copy(exported_run, tmp_path / "few")
    evaluate_run(RunFolder(few), QUIET, ["tuned"], max_rows=5)
    found = compare_runs([two[0], few])
    assert not found.pairs and found.not_comparable == ["held-out rows: few and first: 5 and 12 rows"]


def test_samples_of_other_seeds(exported_run: Path, tmp_path: Path) -> None:
    runs = [changed_copy(exported_run, tmp_path / f"seed{seed}") for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        tree = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        tree["run"]["seed"] = seed
        (run / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        evaluate_run(RunFolder(run), QUIET, ["merged"], max_rows=5)
    found = compare_runs(runs)
    assert not found.pairs and found.not_comparable == ["held-out rows: seed2 and seed1: other run.seed"]


def test_benchmarks_are_paired(two: list[Path]) -> None:
    add_benchmark(two[0], [0.0] * 6 + [1.0] * 4)
    add_benchmark(two[1], [0.0] * 2 + [1.0] * 8)
    found = compare_runs(two)
    [pair] = [pair for pair in found.pairs if pair.task == "gsm8k"]
    assert pair.difference == pytest.approx(0.4) and 0 < pair.low < 0.4 < pair.high and pair.share
    add_benchmark(two[1], [1.0] * 10, fingerprint="other")
    found = compare_runs(two)
    assert "gsm8k" not in {pair.task for pair in found.pairs}
    assert found.not_comparable == ["gsm8k: second and first: other rows or prompts"]


def test_a_run_with_benchmarks_alone(two: list[Path]) -> None:
    (two[1] / "eval" / "results.json").unlink()
    for run in two:
        add_benchmark(run, [1.0, 0.0, 1.0])
    assert [pair.task for pair in compare_runs(two).pairs] == ["gsm8k"]


def test_a_run_that_was_never_evaluated(two: list[Path], exported_run: Path) -> None:
    with pytest.raises(EvalError, match=r"was never evaluated\. qlora-kit eval "):
        compare_runs([two[0], exported_run])


def test_runs_that_cannot_be_compared(two: list[Path], tmp_path: Path) -> None:
    for folders in ([two[0]], [two[0], two[0]]):
        with pytest.raises(EvalError, match=r"runs to compare .*Allowed: two or more, each once"):
            compare_runs(folders)
    with pytest.raises(RunError, match="is no run folder"):
        compare_runs([two[0], tmp_path / "none"])


def test_by_the_command_line(two: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    add_benchmark(two[0], [1.0, 0.0, 1.0])
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *map(str, two)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("trainable parameters", "gsm8k", "second:tuned - first:tuned", "66.67%"))
    assert main(["compare", *map(str, two), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert list(tree["runs"]) == ["first", "second"] and len(tree["pairs"]) == 6
    forms = tree["runs"]["first"]["forms"]
    assert forms["tuned"]["gsm8k"]["acc"]["value"] == pytest.approx(2 / 3)
    assert forms["base_nf4"]["held-out rows"]["loss"]["value"] > 0
    assert main(["compare", str(two[0])]) == 2
