"""lm-eval's tasks on local files: the same prompts and answers, and errors that name the file."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from harness_files import WORDS, write, write_task_data

from qlora_kit.errors import DataError, EvalError
from qlora_kit.eval.harness import install
from qlora_kit.eval.harness.tasks import load_tasks, local_names


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("task-data"))


def load(folder: Path, name: str, few_shot: int | None = None) -> Any:
    return load_tasks([name], folder, few_shot)["tasks"][name]


def test_mmlu(task_data: Path) -> None:
    task = load(task_data, "mmlu_anatomy")
    doc = task.eval_docs[1]
    assert doc == {"question": "What is 1?", "choices": ["None", "a, boat", "salt", "1"], "answer": 1}
    assert task.doc_to_text(doc) == "What is 1?\nA. None\nB. a, boat\nC. salt\nD. 1\nAnswer:"
    assert task.get_config("num_fewshot") == 0 and len(task.eval_docs) == 6
    shots = load(task_data, "mmlu_anatomy", few_shot=5).fewshot_context(doc, 5)
    assert shots.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nWhat is 0?")
    assert shots.count("Answer:") == 6 and shots.endswith("Answer:")


def test_gsm8k(task_data: Path) -> None:
    task = load(task_data, "gsm8k")
    assert task.get_config("num_fewshot") == 5 and len(task.eval_docs) == 6
    assert task.doc_to_text(task.eval_docs[2]) == "Question: How many rope?\nAnswer:"
    assert task.doc_to_target(task.eval_docs[2]) == "So 2.\n#### 2"


def test_truthfulqa_is_shuffled_and_keeps_its_answer(task_data: Path) -> None:
    tasks = load_tasks(["truthfulqa"], task_data)["tasks"]
    assert sorted(tasks) == ["truthfulqa_mc1", "truthfulqa_mc2"], "the generating one needs other data"
    task = tasks["truthfulqa_mc1"]
    places = [task.doc_to_target(doc) for doc in task.eval_docs]
    right = [task.doc_to_choice(doc)[place] for doc, place in zip(task.eval_docs, places)]
    assert right == [f"yes {word}" for word in WORDS]
    assert len(set(places)) > 1, "nothing was shuffled"
    again = load(task_data, "truthfulqa_mc1")
    assert [doc["mc1_targets"] for doc in again.eval_docs] == [doc["mc1_targets"] for doc in task.eval_docs]
    assert tasks["truthfulqa_mc2"].process_results(task.eval_docs[0], [(-1.0, False)] * 3)["acc"] == pytest.approx(
        2 / 3
    )
    assert load(task_data, "truthfulqa_mc1", few_shot=3).get_config("num_fewshot") == 0, "its prompt is fixed"


def test_wikitext_by_article(task_data: Path) -> None:
    task = load(task_data, "wikitext")
    assert [doc["page"].split("\n")[0] for doc in task.eval_docs] == [f" = {word} = " for word in WORDS[:4]]
    assert task.doc_to_target(task.eval_docs[0]).startswith(" = stone =\n")


def test_a_group_holds_its_tasks(tmp_path: Path) -> None:
    names = [name.removeprefix("mmlu_") for name in local_names() if name.startswith("mmlu_")]
    folder = write_task_data(tmp_path, tuple(names))
    loaded = load_tasks(["mmlu_other"], folder)
    assert list(loaded["groups"]) == ["mmlu_other"] and len(loaded["tasks"]) == 13
    assert "mmlu_virology" in loaded["tasks"] and "mmlu_anatomy" not in loaded["tasks"]
    with pytest.raises(EvalError, match=r"a task cannot be loaded: Duplicate task 'mmlu_virology'.*Name a task once"):
        load_tasks(["mmlu_other", "mmlu_virology"], folder)


def test_a_task_that_is_not_there_lists_those_that_are(task_data: Path) -> None:
    with pytest.raises(EvalError, match=r"no such task \(got 'hellaswag'\)\. Allowed: gsm8k, mmlu, .*mmlu_SUBJECT"):
        load_tasks(["hellaswag"], task_data)


@pytest.mark.slow
def test_tasks_of_the_hub() -> None:
    with pytest.raises(EvalError, match=r"no such task \(got 'gsm8'\)\. Allowed: .*gsm8k"):
        load_tasks(["gsm8"], None)
    with pytest.raises(EvalError, match=r"a task cannot be loaded: .*openai/gsm8k.*give --task-data"):
        load_tasks(["gsm8k"], None)  # tests are offline


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k/train\.jsonl is missing\. Put the benchmark's file there"):
        load_tasks(["gsm8k"], tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "task", "message"),
    [
        ("mmlu/test/anatomy_test.csv", "q,a,b,c,d,E\n", "mmlu_anatomy", r"anatomy_test\.csv row 1: answer \(got 'E'\)"),
        ("mmlu/test/anatomy_test.csv", "q,a\n", "mmlu_anatomy", r"anatomy_test\.csv .*row 1: answer|cannot be read"),
        ("gsm8k/test.jsonl", '{"question": "a?", "answer": "3"}\n', "gsm8k", r"test\.jsonl row 1: answer \(got '3'\)"),
        ("gsm8k/test.jsonl", '{"question": 3, "answer": "#### 3"}\n', "gsm8k", r"test\.jsonl row 1: question \(got 3"),
        ("gsm8k/test.jsonl", "{\n", "gsm8k", r"test\.jsonl cannot be read as json"),
        ("wikitext-2/test.txt", "no title\n", "wikitext", r"wikitext-2/test\.txt holds no article"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, file: str, text: str, task: str, message: str) -> None:
    write(write_task_data(tmp_path) / file, text)
    with pytest.raises(DataError, match=message):
        load_tasks([task], tmp_path)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"choices": ["a", "b"], "labels": [1, 1]}, r"validation\.json row 1: mc1_targets\.labels \(got \[1, 1\]\)"),
        ({"choices": ["a"], "labels": [1, 0]}, r"validation\.json row 1: mc1_targets .*as many labels"),
    ],
)
def test_targets_that_do_not_fit(tmp_path: Path, targets: dict[str, Any], message: str) -> None:
    row = {"question": "a?", "mc1_targets": targets, "mc2_targets": {"choices": ["a"], "labels": [1]}}
    write(tmp_path / "truthfulqa" / "validation.json", json.dumps([row]))
    with pytest.raises(DataError, match=message):
        load_tasks(["truthfulqa_mc1"], tmp_path)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(install, "version", none)
    with pytest.raises(EvalError, match=r'lm-eval is not installed\. pip install "qlora-kit\[benchmarks\]"'):
        install.lm_eval_version()
