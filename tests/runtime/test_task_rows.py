"""Files of rows for the task verbs: what is read and written, and what is refused in one line."""

from __future__ import annotations

import csv
import json

import pytest
from qlora_runtime.errors import ArgumentError
from qlora_runtime.task_rows import read_rows
from qlora_runtime.texts import TextEncoder
from qlora_runtime.windows import QuestionWindows
from qlora_runtime.words import WordEncoder
from tiny_tasks import task_tokenizer

from .test_task_cli import read_lines, run, write_lines

GLUE = 'text\tkind\n"Bad start\tneg\ngreat\tpos\nso he said: bye"\tneg\n'


def refused(capsys, bundle, verb, path, output, *options):
    """What is said on stderr, by exit code 2 and without an output."""
    code, _, err = run(capsys, verb, bundle.directory, "--input", path, "-o", output, *options)
    assert code == 2 and err.startswith("qlora-runtime: ArgumentError: ") and err.count("\n") == 1
    assert not output.exists() or output.samefile(path)
    return err


@pytest.mark.parametrize(
    ("bundle", "verb", "row", "taken"),
    [
        ("bert classifies", "classify", {"text": "a", "predicted_label": "mine"}, "['predicted_label']"),
        (
            "bert classifies",
            "classify",
            {"text": "a", "truncated": 1, "probability": 2},
            "['probability', 'truncated']",
        ),
        ("distilbert gives several labels", "classify", {"text": "a", "predicted_labels": []}, "['predicted_labels']"),
        ("llama rates", "rate", {"text": "a", "predicted_value": 3}, "['predicted_value']"),
        ("bert tags", "tag", {"words": ["a"], "predicted_tags": ["O"]}, "['predicted_tags']"),
        (
            "bert answers",
            "answer",
            {"question": "a", "context": "b", "answer_start": 1, "answer_score": 2},
            "['answer_start', 'answer_score']",
        ),
    ],
)
def test_a_rows_own_columns_are_not_overwritten(capsys, task_bundle, tmp_path, bundle, verb, row, taken):
    path = write_lines(tmp_path / "in.jsonl", [row])
    err = refused(capsys, task_bundle(bundle), verb, path, tmp_path / "out.jsonl")
    assert f"in.jsonl, line 1: the answer's columns {taken} are there already. Rename them in the input." in err


@pytest.mark.parametrize(
    ("bundle", "verb", "row"),
    [
        ("bert classifies", "classify", {"text": "a", "label": "mine"}),
        ("llama rates", "rate", {"text": "a", "value": 3}),
        ("bert tags", "tag", {"tokens": ["a"], "words": 3, "tags": ["O"]}),
        ("bert answers", "answer", {"question": "a", "context": "b", "answers": [], "start": 1}),
    ],
)
def test_the_true_answers_stay_beside_the_predicted_ones(capsys, task_bundle, tmp_path, bundle, verb, row):
    path, output = write_lines(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    more = ["--column", "words=tokens"] if "tokens" in row else []
    code, _, err = run(capsys, verb, task_bundle(bundle).directory, "--input", path, "--output", output, *more)
    (told,) = read_lines(output.read_text(encoding="utf-8"))
    assert (code, err) == (0, "")
    assert {name: told[name] for name in row} == row and len(told) > len(row)


def test_the_output_is_not_the_input(capsys, task_bundle, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl"):
        err = refused(capsys, task_bundle("bert classifies"), "classify", path, output)
        assert f"{output.name} is the input. Give another --output." in err
    assert path.read_text() == '{"text": "a"}\n'


LINES = [
    ("in.jsonl", '{"text": "a \\ud800 film"}\n', "line 1: column 'text' holds half a surrogate pair, which is no"),
    ("in.jsonl", '{"text": "a", "\\udcff": 1}\n', "line 1: column '\\udcff' holds half a surrogate pair"),
    ("in.jsonl", '{"text": "a"}\n{"text": "a", "n": [NaN]}\n', "line 2: column 'n' holds what JSON does not have"),
    ("in.jsonl", '{"text": "a", "n": -1e999}\n', "line 1: column 'n' holds what JSON does not have"),
    ("in.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
    ("in.jsonl", '{"text": " \\n"}\n', "line 1: text is blank, expected text. Fill it, or leave the row out"),
    ("in.jsonl", "\n", "in.jsonl holds no rows. Check that it was written completely"),
    ("in.csv", "", "in.csv holds no rows"),
    ("in.csv", "text,id\n", "in.csv holds no rows"),
    ("in.csv", "text\n \n", "line 2: text is blank"),
    ("in.csv", "text,text\na,b\n", "line 1: the header is ['text', 'text'], expected a different name for each"),
    ("in.csv", "text,\na,b\n", "line 1: the header is ['text', ''], expected a different name"),
    ("in.csv", 'text,id\na,1\n"b,2\n', "line 3: unexpected end of data. Check the quotes from this line on"),
    ("in.tsv", 'text\tid\n"a\nb"\t2\n', "line 2: the row has not as many cells as the header has columns: 1, not 2"),
]


@pytest.mark.parametrize(("name", "content", "message"), LINES)
def test_rows_that_are_refused(capsys, task_bundle, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert message in refused(capsys, task_bundle("bert classifies"), "classify", path, tmp_path / "out.jsonl")


def test_half_a_surrogate_pair_on_the_command_line(capsys, task_bundle):
    code, _, err = run(capsys, "classify", task_bundle("bert classifies").directory, "--text", "a \udcff")
    assert code == 2 and "the command line: column 'text' holds half a surrogate pair" in err


def test_half_a_surrogate_pair_in_python():
    tokenizer, message = task_tokenizer("bert").backend_tokenizer, r"half a surrogate pair \('\\ud800' at character 2\)"
    for encode in (
        lambda: TextEncoder(tokenizer, 32).encode(("a", "b \ud800")),
        lambda: WordEncoder(tokenizer, 32).encode(["a", "b \ud800"]),
        lambda: QuestionWindows(tokenizer, 32, 4).encode("a", "b \ud800"),
    ):
        with pytest.raises(ArgumentError, match=message):
            encode()


@pytest.mark.parametrize("words", [[], ["a", " "]])
def test_words_that_are_blank(capsys, task_bundle, tmp_path, words):
    path = write_lines(tmp_path / "in.jsonl", [{"words": words}])
    err = refused(capsys, task_bundle("bert tags"), "tag", path, tmp_path / "out.jsonl")
    assert f"line 1: words is {words}, expected words that are not blank" in err


@pytest.mark.parametrize("second", [{"text": "b", "more": 1}, {"text": "b"}])
def test_a_table_has_one_set_of_columns(capsys, task_bundle, tmp_path, second):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a", "id": 1}, second])
    err = refused(capsys, task_bundle("bert classifies"), "classify", path, tmp_path / "out.csv")
    assert "row 2 has other columns than the first" in err and "Write to a .jsonl file" in err


def test_a_tsv_holds_no_line_breaks(capsys, task_bundle, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a\nb"}])
    err = refused(capsys, task_bundle("bert classifies"), "classify", path, tmp_path / "out.tsv")
    assert "row 1 has a line break in a cell, which a .tsv file cannot hold. Write to a .csv or .jsonl file" in err


def test_tsv_without_quoting_there_and_back(capsys, task_bundle, tmp_path):
    path, output = tmp_path / "in.TSV", tmp_path / "out.Tsv"
    path.write_text(GLUE, encoding="utf-8")
    bundle, options = task_bundle("bert classifies"), ["--input", path, "-o", output]
    assert run(capsys, "classify", bundle.directory, *options) == (0, "", "")
    rows, texts = [row for _, row in read_rows(output)], ['"Bad start', "great", 'so he said: bye"']
    assert [row["text"] for row in rows] == texts and [row["kind"] for row in rows] == ["neg", "pos", "neg"]
    for row, expected in zip(rows, bundle.classify(texts), strict=True):
        assert row["predicted_label"] == expected.labels[0] and list(json.loads(row["probabilities"])) == list(
            bundle.task.labels
        )


def test_tsv_with_quoting(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text('text\tid\n"a\tb ""c"""\t1\nd "e"\t2\n', encoding="utf-8")
    assert [row for _, row in read_rows(path)] == [{"text": 'a\tb "c"', "id": "1"}, {"text": 'd "e"', "id": "2"}]


def test_upper_case_endings_long_cells_and_odd_line_ends(capsys, task_bundle, tmp_path):
    path, output, long = tmp_path / "in.JSONL", tmp_path / "out.CSV", "word " * 40_000
    write_lines(path, [{"text": long}, {"text": "a\rfilm"}])
    bundle = task_bundle("bert classifies")
    assert run(capsys, "classify", bundle.directory, "--input", path, "-o", output) == (0, "", "")
    again = [row for _, row in read_rows(output)]
    assert [row["text"] for row in again] == [long, "a\rfilm"] and again[1]["truncated"] == "False"
    with (tmp_path / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [long]])
    _, out, _ = run(capsys, "classify", bundle.directory, "--input", tmp_path / "texts.csv")
    assert read_lines(out)[0]["truncated"] is True
