"""`eval.answer: text`: written answers against all references of their prompt, as E2E's test set has them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rich.console import Console
from tiny_encoders import save_tiny_encoder, write_jsonl
from tiny_run import changed_copy, write_rows
from tiny_task_runs import train_task

from qlora_kit.data.eval_rows import eval_rows
from qlora_kit.errors import DataError
from qlora_kit.eval.compare import compare_runs
from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.results import EvalResults, read_results
from qlora_kit.eval.run import evaluate_run
from qlora_kit.recipe import DataSection
from qlora_kit.train.restore import load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)
SAID = {  # facts: what may be said of them
    "name[Aromi], food[fish]": ["Aromi serves fish.", "You get fish at Aromi.", "There is fish at the Aromi."],
    "name[Zizzi], area[riverside]": ["Zizzi lies by the river."],
    "name[Cotto], food[bread]": ["Cotto bakes bread.", "Bread comes from Cotto."],
    "name[Strada], food[oil]": ["Strada burns lamp oil.", "Lamp oil is what Strada has."],
}
SCORES = ["bleu", "nist", "meteor_exact_stem", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match"]


def rows_of(said: dict[str, list[str]]) -> list[tuple[str, str]]:
    """A row for each text; rows of the same facts do not all stand together."""
    return [(facts, text) for k in range(3) for facts, texts in said.items() for text in texts[k : k + 1]]


def write_e2e(path: Path, said: dict[str, list[str]]) -> Path:
    """Columns mr and ref, as E2E has them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows_of(said)])
    return path


@pytest.fixture
def e2e_csv(tmp_path: Path) -> Path:
    return write_e2e(tmp_path / "e2e.csv", SAID)


def evaluated(run: Path, target: Path, eval_file: Path, columns: dict[str, str], **options: Any) -> EvalResults:
    data = {"eval": str(eval_file), "columns": columns, "schema": None}
    checked = {"answer": "text", "choices": []} | options
    copy = changed_copy(run, target, data=data, eval=checked)
    return evaluate_run(RunFolder(copy), Console(width=120), ["base", "tuned", "bundle_fp32"])


E2E = {"prompt": "mr", "completion": "ref"}


def test_one_row_a_prompt_with_all_its_references(
    exported_run: Path, tmp_path: Path, e2e_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluated(exported_run, tmp_path / "first", e2e_csv, E2E).forms["tuned"].per_row.answer or []
    said = {facts: list(texts) for facts, texts in SAID.items()}
    for k, (texts, text) in enumerate(zip(said.values(), told, strict=True)):
        texts[k % 2 :] = [f"{text} by the sea", *texts[k % 2 :][:2]]  # else nothing that the model says is right
    found = evaluated(exported_run, tmp_path / "run", write_e2e(tmp_path / "near.csv", said), E2E)
    references = [texts[:3] for texts in said.values()]
    assert found.rows == 4 and found.metrics["references"] == references
    tuned, bundle = found.forms["tuned"], found.forms["bundle_fp32"]
    assert told == tuned.per_row.answer == bundle.per_row.answer and tuned.accuracy is None
    assert list(tuned.scores) == SCORES
    streams = [[row[k] if k < len(row) else None for row in references] for k in range(3)]
    assert tuned.scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(told, streams).score)
    assert tuned.scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(told, streams).score)
    for name in ("nist", "meteor_exact_stem", "rougeL"):
        wanted = compute_metric("rouge" if "rouge" in name else name, predictions=told, references=references)[name]
        assert tuned.scores[name].value == pytest.approx(wanted)
    assert min(tuned.scores[name].value for name in ("nist", "meteor_exact_stem", "chrf", "rouge1")) > 0, told
    assert tuned.scores["exact_match"].value == 0
    pairs = {(pair.a, pair.b, pair.metric): pair for pair in found.pairs}
    assert pairs["bundle_fp32", "tuned", "bleu"].difference == 0 == pairs["bundle_fp32", "tuned", "nist"].disagree
    assert ("tuned", "base", "meteor_exact_stem") in pairs
    printed = capsys.readouterr().out
    assert "no synonyms (those need WordNet)" in printed.replace("\n", " ") and "meteor_exact_stem │" in printed
    assert read_results(tmp_path / "run") == found


def test_a_list_of_references_is_the_same_as_rows_of_one(exported_run: Path, tmp_path: Path, e2e_csv: Path) -> None:
    rows = write_rows(tmp_path / "e2e.jsonl", [{"mr": facts, "refs": said} for facts, said in SAID.items()])
    by_rows = evaluated(exported_run, tmp_path / "a", e2e_csv, E2E)
    by_lists = evaluated(exported_run, tmp_path / "b", rows, {"prompt": "mr", "completion": "refs"})
    for form, result in by_rows.forms.items():
        assert by_lists.forms[form].per_row == result.per_row and by_lists.forms[form].scores == result.scores
    again = evaluated(exported_run, tmp_path / "c", rows, {"prompt": "mr", "completion": "refs"})
    assert again.forms["tuned"].scores == by_lists.forms["tuned"].scores
    paired = {pair.metric: pair.difference for pair in compare_runs([tmp_path / "b", tmp_path / "c"]).pairs}
    assert set(SCORES) <= set(paired) and not any(paired.values())


def test_an_exact_answer_is_any_reference(exported_run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": facts, "completion": said} for facts, said in SAID.items()]
    first = write_rows(tmp_path / "first.jsonl", rows)
    asked = evaluated(exported_run, tmp_path / "a", first, {}, answer="exact").forms["tuned"]
    rows[0]["completion"] = ["never said", (asked.per_row.answer or [])[0]]
    second = write_rows(tmp_path / "second.jsonl", rows)
    assert evaluated(exported_run, tmp_path / "b", second, {}, answer="exact").forms["tuned"].per_row.correct == [
        *(1, *(asked.per_row.correct or [])[1:]),
    ]


def test_max_rows_counts_prompts(exported_run: Path, e2e_csv: Path) -> None:
    tokenizer = load_run_tokenizer(RunFolder(exported_run))
    section = DataSection(train=str(e2e_csv), eval=str(e2e_csv), columns=E2E, max_seq_len=96)
    every = eval_rows(section, tokenizer, 7, one_a_prompt=True)
    assert [row.references for row in every] == [tuple(said) for said in SAID.values()]
    assert [row.completion for row in every] == [said[0] for said in SAID.values()]
    some = eval_rows(section, tokenizer, 7, 2, one_a_prompt=True)
    assert len(some) == 2 and {row.place for row in some} <= {row.place for row in every}
    assert all(row.references in [tuple(said) for said in SAID.values()] for row in some)
    assert len(eval_rows(section, tokenizer, 7)) == 8, "otherwise each row is asked"


@pytest.mark.parametrize(
    ("completion", "match"),
    [
        ([], r"row 2: completion is an empty list\. Allowed: a text, or a list of texts"),
        (["fish", " "], r"row 2: completion\[1\] is empty"),
        (["fish", 3], r"row 2: completion\[1\] is int, not text \(got 3\)"),
        ([["fish"]], r"row 2: completion\[0\] is list, not text"),
        ({"a": "fish"}, r"row 2: completion is dict, not text"),
    ],
)
def test_wrong_references_name_file_and_row(exported_run: Path, tmp_path: Path, completion: Any, match: str) -> None:
    rows = write_rows(
        tmp_path / "bad.jsonl", [{"prompt": "a", "completion": ["x", "y"]}, {"prompt": "b", "completion": completion}]
    )
    with pytest.raises(DataError, match=rf"bad\.jsonl {match}"):
        evaluated(exported_run, tmp_path / "run", rows, {})


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ([], r"row 2: target is empty"),
        (["fish", ""], r"row 2: target\[1\] is empty"),
        (["fish", None], r"row 2: target\[1\] is null"),
        ([7], r"row 2: target\[0\] is int, not text"),
    ],
)
def test_wrong_targets_name_file_and_row(tmp_path: Path, target: Any, match: str) -> None:
    rows = [{"source": "a b", "target": ["x", "y"]}, {"source": "c d", "target": target}]
    model = save_tiny_encoder(tmp_path / "model", "t5")
    with pytest.raises(DataError, match=rf"rows\.jsonl {match}"):
        train_task(tmp_path, model, {"type": "seq2seq"}, rows, [{"source": "a", "target": "x"}])


def test_an_encoder_decoder_is_scored_against_all_targets_of_a_source(tmp_path: Path) -> None:
    train = [{"source": facts, "target": said} for facts, said in SAID.items()]
    held_out = [
        {"source": facts, "target": text} for k in range(3) for facts, said in SAID.items() for text in said[k : k + 1]
    ]
    model = save_tiny_encoder(tmp_path / "model", "t5")
    run = train_task(
        tmp_path, model, {"type": "seq2seq", "max_target_len": 24}, train, held_out, eval={"max_new_tokens": 8}
    )
    found = evaluate_run(run, QUIET, ["tuned"])
    assert found.rows == 4 and found.metrics["references"] == [list(said) for said in SAID.values()]
    tuned = found.forms["tuned"]
    assert list(tuned.scores) == SCORES
    sides = {"predictions": tuned.per_row.answer, "references": found.metrics["references"]}
    assert tuned.scores["bleu"].value == pytest.approx(compute_metric("bleu", **sides)["bleu"])
    lists = write_jsonl(tmp_path / "lists.jsonl", train)
    copy = changed_copy(run.path, tmp_path / "copy", data={"eval": str(lists)})
    again = evaluate_run(RunFolder(copy), QUIET, ["tuned"]).forms["tuned"]
    assert again.scores == tuned.scores and again.per_row.answer == tuned.per_row.answer
    assert (
        json.loads((copy / "eval" / "results.json").read_text())["metrics"]["row_hashes"] == found.metrics["row_hashes"]
    )
    assert evaluate_run(RunFolder(copy), QUIET, ["tuned"], max_rows=2).rows == 2
