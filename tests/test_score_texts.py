"""scripts/score_texts.py: scores of the texts that `qlora-kit predict` wrote."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import sacrebleu

MADE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "score_texts.py"))
ROWS = [
    {"facts": "a", "ref": "a small pub by the river", "generated_text": "a small pub by the river"},
    {"facts": "a", "ref": "by the river there is a small pub", "generated_text": "never looked at"},
    {"facts": "b", "ref": "a café that serves fish to families", "generated_text": "a café that serves fish"},
]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_they_are_those_of_sacrebleu(
    answers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["score_texts.py", str(answers), "--reference", "ref", "--group", "facts"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    MADE["main"]()
    found = json.loads(capsys.readouterr().out)
    told = [ROWS[0]["generated_text"], ROWS[2]["generated_text"]]
    streams = [[ROWS[0]["ref"], ROWS[2]["ref"]], [ROWS[1]["ref"], None]]
    assert found["rows"] == 2
    assert found["scores"]["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(told, streams).score)
    assert found["scores"]["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(told, streams).score)
    assert found["scores"]["exact_match"]["value"] == 0.5 and 0 < found["scores"]["rougeL"]["low"] <= 1
    monkeypatch.setattr(sys, "argv", command)
    MADE["main"]()
    assert capsys.readouterr().out.startswith("2 rows\nbleu ")


def test_without_groups_each_row_counts(answers: Path) -> None:
    told, references = MADE["answers_and_references"](answers, "generated_text", "ref")
    assert len(told) == 3 and references == [[row["ref"]] for row in ROWS]


@pytest.mark.parametrize(
    ("answer", "reference", "group"), [("x", "ref", None), ("ref", "x", None), ("ref", "ref", "x")]
)
def test_a_missing_column_is_named(answers: Path, answer: str, reference: str, group: str | None) -> None:
    with pytest.raises(SystemExit, match="row 1: no text in column 'x'; it has facts, ref, generated_text"):
        MADE["answers_and_references"](answers, answer, reference, group)


def test_a_broken_row_is_named(answers: Path) -> None:
    answers.write_text(answers.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="row 4: broken JSON"):
        MADE["answers_and_references"](answers, "generated_text", "ref")
