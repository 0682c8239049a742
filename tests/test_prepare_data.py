"""scripts/prepare_data.py: the rows of recipes whose data comes in a form of its own."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.recipe_file import load_recipe, shipped_recipes

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"
MADE = runpy.run_path(str(SCRIPT))
FACTS = "name[The Mill], eatType[pub], food[F{k}]"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", MADE["PREPARE"])
def test_a_recipe_reads_what_is_prepared(name: str) -> None:
    (recipe,) = [load_recipe(shipped) for shipped in shipped_recipes() if shipped.endswith(f"-{name}")]
    assert (recipe.data.train, recipe.data.eval) == (f"data/{name}/train.jsonl", f"data/{name}/eval.jsonl")


@pytest.mark.parametrize("name", [name for name in MADE["PREPARE"] if name != "code"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no file .*--data names the folder it lies in, docs/recipes.md where"):
        MADE["PREPARE"][name](tmp_path)


def test_parts_of_addresses_are_spans(tmp_path: Path) -> None:
    one = "<AddressString><No>7</No> <Name>St</Name> <Name>James Park</Name> <Zip>90</Zip></AddressString>"
    write(tmp_path / "addresses" / "labeled.xml", f"<AddressCollection>{one * 11}</AddressCollection>")
    train, held_out = MADE["addresses"](tmp_path)
    assert (len(train), len(held_out)) == (8, 3)
    assert train[0] == {
        "words": ["7", "St", "James", "Park", "90"],
        "tags": ["B-No", "B-Name", "I-Name", "I-Name", "B-Zip"],
    }


def test_topics_are_those_of_the_subjects(tmp_path: Path) -> None:
    subjects = " ".join(MADE["TOPICS"].values()).split()
    assert len(subjects) == len(set(subjects)) == 57 and len(MADE["TOPICS"]) == 17
    for subject in subjects:
        for split in ("dev", "val", "test"):
            rows = f'"Q {subject}\u2028{split}, so?",a,b,c,d,B\n' + (f"{subject} again,a,b,c,d,A\n" * (split != "dev"))
            write(tmp_path / "mmlu" / split / f"{subject}_{split}.csv", rows)
    train, held_out = MADE["topics"](tmp_path)
    assert len(train) == 3 * 57
    texts = [f"Q {subject}\u2028test, so?" for subject in subjects]  # the lines between are in val too
    tested = [text for text in texts for text in (text, "")][::7]
    assert [row["text"].split("\n")[0] for row in held_out] == [text for text in tested if text]
    assert train[0] == {"text": "Q college_biology\u2028dev, so?\na\nb\nc\nd", "label": "biology"}


def test_summaries_are_rows_of_their_category(tmp_path: Path) -> None:
    kinds = ("summarization", "open_qa", "summarization")
    rows = [
        {"instruction": f"do {k}", "context": "" if k == 2 else f"text {k}", "response": "so", "category": kinds[k % 3]}
        for k in range(30)
    ]
    write(tmp_path / "dolly" / "databricks-dolly-15k.jsonl", jsonl(rows))
    train, held_out = MADE["summarization"](tmp_path)
    assert (len(train), len(held_out)) == (16, 3), "a row without a text has nothing to sum up"
    assert train[0] == {"instruction": "do 0", "input": "text 0", "output": "so"}


def test_without_categories_summaries_are_told_by_their_words(tmp_path: Path) -> None:
    asks = {
        "Summarise this.": True,
        "Who was Ada Lovelace?": True,
        "What is FIFA?": True,
        "Who was the first programmer?": False,
        "How many seasons were there?": False,
    }
    long, short = "a text that goes on " * 20, "what it comes to " * 8
    rows = [{"instruction": ask, "input": long, "output": short} for ask in asks]
    rows += [{"instruction": "Summarise this.", "input": text, "output": short} for text in ("", short)]
    write(tmp_path / "dolly" / "dolly_train.json", json.dumps(rows))
    train, held_out = MADE["summarization"](tmp_path)
    assert [row["instruction"] for row in train + held_out] == [ask for ask, taken in asks.items() if taken]


def test_chats_keep_their_turns_and_stay_together(tmp_path: Path) -> None:
    first = "### Human: hello {k} ### Assistant:"
    rows = [{"input": first.format(k=k), "output": "hi\u2028you", "lang": "en"} for k in range(10)]
    rows.append(
        {"input": f"{first.format(k=9)} hi ### Human: and\n### now? ### Assistant:", "output": "so", "lang": "en"}
    )
    rows.append({"input": first.format(k=1), "output": "hola", "lang": "es"})
    write(tmp_path / "oasst1" / "oa_questions.jsonl", jsonl(rows))
    train, held_out = MADE["chat"](tmp_path)
    assert (len(train), len(held_out)) == (9, 2)
    contents = [(message["role"], message["content"]) for message in held_out[1]["messages"]]
    assert contents == [("user", "hello 9"), ("assistant", "hi"), ("user", "and\n### now?"), ("assistant", "so")]
    assert train[0]["messages"][1]["content"] == "hi\u2028you"


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        ("hello", "hi"),
        ("### Assistant: hello ### Human:", "hi"),
        ("### Human: hello ### Human: are you there? ### Assistant:", "hi"),
        ("### Human: ### Assistant:", "hi"),
        ("### Human: hello ### Assistant:", "  "),
    ],
)
def test_turns_that_do_not_alternate_are_refused(before: str, answer: str) -> None:
    with pytest.raises(SystemExit, match="no conversation of a human and an assistant in turn: '"):
        MADE["conversation"](before, answer)


def test_functions_are_whole_and_of_the_library() -> None:
    train, held_out = MADE["code"](Path("nowhere"))
    assert len(train) > 300 and len(held_out) > 30
    for row in [*train[:50], *held_out[:50]]:
        (function,) = ast.parse(row["text"]).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function)
    assert MADE["code"](Path("nowhere")) == (train, held_out)


def test_functions_without_docstring_or_body_are_left_out(tmp_path: Path) -> None:
    said = (
        '    """Says what it does, in the encoding that the file declares: \xe9. ' + "It is long enough. " * 4 + '"""\n'
    )
    bare = f"def bare(x):\n{said}\n"
    text = f"# coding: latin-1\ndef kept(x):\n{said}    return x\n\n{bare}def _own(x):\n{said}    return x\n"
    file = tmp_path / "module.py"
    file.write_bytes(text.encode("latin-1"))
    assert list(MADE["documented_functions"](file)) == [f"def kept(x):\n{said}    return x"]


def test_a_wish_does_not_say_the_name(tmp_path: Path) -> None:
    lines = [f'"{FACTS.format(k=k)}","the mill{"s" * (k % 2)} is a pub, {k}; go to The Mill."' for k in range(10)]
    lines += [f'"{FACTS.format(k=9)}",Nice', f'"{FACTS.format(k=8)}",Nice']
    write(tmp_path / "e2e" / "devset.csv", "\n".join(["mr,ref", *lines]))
    train, held_out = MADE["recommender"](tmp_path)
    wish = "Which place would you recommend? this place is a pub, 9; go to this place."
    assert held_out == [{"prompt": wish, "completion": "The Mill"}], "'Nice' is in training too, for other facts"
    assert len(train) == 10 and not any("mill" in row["prompt"].lower() for row in train)


def test_facts_without_a_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "e2e" / "devset.csv", 'mr,ref\n"eatType[pub], area[riverside]",A pub.\n')
    with pytest.raises(SystemExit, match=r"no name\[...\] among the facts: 'eatType\[pub\], area"):
        MADE["recommender"](tmp_path)


def test_the_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": f"### Human: {k} ### Assistant:", "output": "hi", "lang": "en"} for k in range(20)]
    write(tmp_path / "in" / "oasst1" / "oa_questions.jsonl", jsonl(rows))
    command = ["prepare_data.py", "chat", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    MADE["main"]()
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out" / "chat").iterdir()}
    assert {name: text.count("\n") for name, text in written.items()} == {"train.jsonl": 18, "eval.jsonl": 2}
    assert "train.jsonl: 18 rows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "verses"])
    with pytest.raises(SystemExit):
        MADE["main"]()
    assert "invalid choice: 'verses'" in capsys.readouterr().err
