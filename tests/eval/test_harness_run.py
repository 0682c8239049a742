"""`qlora-kit eval --tasks` on a tiny run: scores, intervals, pairs, and a file that grows."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from harness_files import write, write_task_data
from rich.console import Console
from tiny_run import changed_copy

from qlora_kit.cli import main
from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.code.run import Settings
from qlora_kit.eval.code.sandbox import Limits, require_sandbox
from qlora_kit.eval.harness.command import code_settings
from qlora_kit.eval.harness.pairs import compare_scores, metric_of, rows_of, why_not_comparable
from qlora_kit.eval.harness.results import Benchmarks, Metric, TaskScore, merge_benchmarks, read_benchmarks
from qlora_kit.eval.harness.run import run_benchmarks
from qlora_kit.eval.harness.scoring import score_form_on
from qlora_kit.eval.harness.tasks import load_tasks, local_names
from qlora_kit.eval.run import find_forms
from qlora_kit.options import parse_options
from qlora_kit.train.restore import load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("task-data"))


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(changed_copy(exported_run, tmp_path / "run"))


def score(value: float, values: list[Any], **changes: Any) -> TaskScore:
    fields: dict[str, Any] = {
        "metrics": {"acc": Metric(value, None, None, True, True)},
        "rows": len(values),
        "rows_in_all": 9,
        "few_shot": 0,
        "version": "1",
        "source": "local files",
        "fingerprint": "abc",
        "adapter": None,
        "tools": {},
        "per_row": {"acc": values},
    }
    return TaskScore(**{**fields, **changes})


def test_forms_on_tasks(run: RunFolder, task_data: Path) -> None:
    shown = io.StringIO()
    asked = {"task_data": task_data, "limit": 5}
    names = ["mmlu_anatomy", "truthfulqa", "wikitext"]
    found = run_benchmarks(run, Console(file=shown, width=160), names, ["base", "tuned", "bundle_fp32"], **asked)
    assert read_benchmarks(run.path) == found and list(found) == ["base", "tuned", "bundle_fp32"]
    assert list(found["tuned"]) == ["mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2", "wikitext"]
    mmlu, wiki = found["tuned"]["mmlu_anatomy"], found["tuned"]["wikitext"]
    assert (mmlu.rows, mmlu.rows_in_all, wiki.rows) == (5, 6, 4)
    assert mmlu.metrics["acc"].value == pytest.approx(sum(mmlu.per_row["acc"]) / 5)
    nats, words = (sum(row[k] for row in wiki.per_row["word_perplexity"]) for k in (0, 1))
    perplexity = wiki.metrics["word_perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-nats / words)) and not perplexity.higher_is_better
    assert perplexity.low < perplexity.value < perplexity.high
    for task, tuned in found["tuned"].items():
        for metric, number in tuned.metrics.items():
            assert found["bundle_fp32"][task].metrics[metric].value == pytest.approx(number.value, rel=1e-3)
    assert found["base"]["wikitext"].per_row != wiki.per_row, "the adapter changes something"
    text = shown.getvalue()
    assert "5 of 6" in text and "bundle_fp32 - tuned" in text and "bits_per_byte" in text
    assert (run.path / "eval" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_the_file_grows_and_forgets_other_adapters(run: RunFolder, task_data: Path) -> None:
    run_benchmarks(run, QUIET, ["wikitext"], ["tuned"], task_data=task_data)
    run_benchmarks(run, QUIET, ["mmlu_anatomy"], ["base"], task_data=task_data)
    merged = run_benchmarks(run, QUIET, ["mmlu_anatomy"], ["tuned"], task_data=task_data, limit=3)
    assert {form: list(scores) for form, scores in merged.items()} == {
        "tuned": ["wikitext", "mmlu_anatomy"],
        "base": ["mmlu_anatomy"],
    }
    assert merged["tuned"]["mmlu_anatomy"].rows == 3
    again = merge_benchmarks(run.path, {"base": {"wikitext": score(1.0, [1.0])}}, adapter="trained on since")
    assert again == read_benchmarks(run.path)
    assert {form: list(scores) for form, scores in again.items()} == {"base": ["mmlu_anatomy", "wikitext"]}


def test_a_group_is_its_tasks_together(exported_run: Path, tmp_path: Path) -> None:
    names = [name.removeprefix("mmlu_") for name in local_names() if name.startswith("mmlu_")]
    tasks = load_tasks(["mmlu_social_sciences"], write_task_data(tmp_path, tuple(names)))
    run = RunFolder.open(exported_run)
    form: Any = find_forms(run, load_run_tokenizer(run))["merged"]()
    found = score_form_on(form, tasks, 3, "local files", None, {})
    group = found["mmlu_social_sciences"]
    assert len(group.tasks) == 12 and group.rows == 36 and group.rows_in_all == 72
    rows = rows_of(found, "mmlu_social_sciences", "acc")
    assert len(rows) == 36 and sum(rows) / 36 == pytest.approx(group.metrics["acc"].value)
    pair = compare_scores(("a", found), ("b", found), "mmlu_social_sciences", "acc")
    assert (pair.rows, pair.difference, pair.low, pair.high) == (36, 0, 0, 0)


def test_intervals_of_metrics() -> None:
    rows = [1.0, 0.0, 1.0, 1.0]
    found = metric_of("acc", 0.75, 0.1, rows, True)
    assert (found.low, found.high) == pytest.approx((0.554, 0.946), abs=1e-3)
    assert metric_of("acc", 0.75, 0.25, rows, True).high == 1, "a share ends at 1"
    assert metric_of("acc", 1.0, 0.0, [1.0] * 4, True).low is None, "rows that are all alike say little"
    assert metric_of("acc", 0.75, "N/A", rows, True).low is None
    texts: list[Any] = [[-10.0 * k, 10.0] for k in (1, 2, 3)]
    bits = metric_of("bits_per_byte", 2 / math.log(2), "N/A", texts, False)
    assert bits.low < bits.value < bits.high and not bits.share
    assert bits.low == pytest.approx(1 / math.log(2)) and bits.high == pytest.approx(3 / math.log(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "abd"}, "gsm8k: a and b were scored on other rows: other rows or prompts"),
        ({"few_shot": 5}, "0 and 5 examples in the prompt"),
        ({"rows": 2}, "3 and 2 rows"),
    ],
)
def test_other_rows_are_no_pair(changes: dict[str, Any], message: str) -> None:
    rows = [1.0, 0.0, 1.0]
    a, b = {"gsm8k": score(0.67, rows)}, {"gsm8k": score(0.67, rows, **changes)}
    with pytest.raises(EvalError, match=message):
        compare_scores(("a", a), ("b", b), "gsm8k", "acc")


def test_no_such_form(run: RunFolder, task_data: Path) -> None:
    with pytest.raises(EvalError, match=r"no such form \(got 'bundle_int8'\)\. Allowed: base, .*bundle_fp32"):
        run_benchmarks(run, QUIET, ["wikitext"], ["bundle_int8"], task_data=task_data)
    with pytest.raises(EvalError, match=r"humaneval runs programs .*Give --task-data FOLDER with FOLDER/humaneval"):
        run_benchmarks(run, QUIET, ["humaneval"], ["tuned"])
    assert not (run.path / "eval").exists()


def test_humaneval_beside_lm_eval(run: RunFolder, task_data: Path) -> None:
    try:
        require_sandbox()
    except EvalError as error:
        pytest.skip(str(error))
    names = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    problems = [
        (f"Tiny/{k}", "def one():\n", "one", "    return 1\n", "def check(f):\n    assert f() == 1\n") for k in range(2)
    ]
    rows = [json.dumps(dict(zip(names, problem))) for problem in problems]
    write(task_data / "humaneval" / "HumanEval.jsonl", "\n".join(rows))
    found = run_benchmarks(run, QUIET, ["humaneval", "truthfulqa_mc1"], ["merged"], task_data=task_data, limit=1)
    score = found["merged"]["humaneval"]
    assert list(found["merged"]) == ["truthfulqa_mc1", "humaneval"]
    assert (score.rows, score.rows_in_all, score.per_row) == (1, 2, {"pass@1": [0.0]})
    assert score.metrics["pass@1"].value == 0 and (run.path / "eval" / "humaneval_merged.json").exists()
    command = ["eval", str(run.path), "--tasks", "humaneval", "--task-data", str(task_data), "--limit", "1"]
    command += ["--forms", "merged"]
    assert main([*command, "--samples", "3", "--pass-at", "1,2", "--temperature", "0.7", "--time-limit", "5"]) == 0
    drawn = read_benchmarks(run.path)["merged"]["humaneval"]
    assert list(drawn.metrics) == list(drawn.per_row) == ["pass@1", "pass@2"] and drawn.rows == 1
    assert why_not_comparable(drawn, score) == "other rows or prompts"
    written = json.loads((run.path / "eval" / "humaneval_merged.json").read_text(encoding="utf-8"))
    assert {len(samples) for samples in written["per_problem"].values()} == {3}
    assert written["settings"]["limits"]["wall_s"] == 5 and written["settings"]["temperature"] == 0.7


def test_options_of_pass_at_k() -> None:
    """Each option reaches the settings; what is left out is as `Settings` has it."""
    asked = ["eval", "runs/x", "--tasks", "humaneval"]
    assert code_settings(parse_options(asked)) == Settings()
    given = ["--samples", "20", "--pass-at", "10,1", "--temperature", "0.8", "--seed", "3"]
    limits = ["--time-limit", "2.5", "--memory-limit", "256"]
    found = code_settings(parse_options([*asked, *given, *limits]))
    assert (found.samples, found.ks, found.temperature, found.seed) == (20, (1, 10), 0.8, 3)
    assert found.limits == Limits(wall_s=2.5, cpu_s=3, memory_bytes=256 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "0 is out of range; allowed: at least 1"),
        (["--pass-at", "1,ten"], "'1,ten' are no whole numbers; give for example 1,10"),
        (["--pass-at", "0"], "0 is out of range; allowed: at least 1"),
        (["--pass-at", ","], "names none"),
        (["--temperature", "-1"], "-1 is out of range"),
        (["--temperature", "nan"], "nan is out of range"),
        (["--time-limit", "0"], "0 is out of range; allowed: at least 0.1"),
        (["--memory-limit", "8"], "8 is out of range; allowed: at least 64"),
        (["--samples", "2"], "at temperature 0 all samples of a problem are the same (got 2). Draw one, or raise"),
        (["--pass-at", "5"], "pass@5 needs 5 samples of each problem (got 1). Draw more"),
    ],
)
def test_wrong_options_of_pass_at_k(
    run: RunFolder, task_data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any model is loaded."""
    command = ["eval", str(run.path), "--tasks", "humaneval", "--task-data", str(task_data)]
    try:
        assert main([*command, *options]) == 2
    except SystemExit as ended:  # argparse's own
        assert ended.code == 2
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split()) and "scoring" not in printed.out


def test_options_of_pass_at_k_need_humaneval(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for tasks in ([], ["--tasks", "gsm8k"]):
        assert main(["eval", str(run.path), *tasks, "--samples", "2", "--time-limit", "3"]) == 2
        wanted = "only humaneval draws programs and runs them (got '--samples, --time-limit'). Add --tasks humaneval"
        assert wanted in " ".join(capsys.readouterr().err.split())


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    (run.path / "eval").mkdir()
    file = run.path / "eval" / "benchmarks.json"
    with pytest.raises(RunError, match=r"no benchmarks in .*--tasks first"):
        read_benchmarks(run.path)
    for text, message in (("{", "is damaged"), ("{}", "is not of the format qlora-benchmarks/1")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RunError, match=rf"benchmarks\.json {message}.*Move it away"):
            merge_benchmarks(run.path, {}, None)


def test_a_number_that_is_not_finite_is_not_written(run: RunFolder) -> None:
    bad: Benchmarks = {"base": {"gsm8k": score(math.nan, [1.0])}}
    with pytest.raises(EvalError, match="a number that is not finite"):
        merge_benchmarks(run.path, bad, None)


def test_by_the_command_line(run: RunFolder, task_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(run.path), "--tasks", "truthfulqa_mc1", "--task-data", str(task_data), "--limit", "3"]
    assert main([*command, "--forms", "merged"]) == 0
    assert "truthfulqa_mc1" in capsys.readouterr().out
    assert json.loads((run.path / "eval" / "benchmarks.json").read_text())["forms"]["merged"]["truthfulqa_mc1"]
    assert main(["eval", str(run.path), "--limit", "3"]) == 2
    assert "--task-data, --limit and --few-shot go with --tasks" in capsys.readouterr().err
    assert main([*command, "--rows", "3"]) == 2
    assert "--rows counts held-out rows, not those of --tasks. Give --limit instead" in capsys.readouterr().err
