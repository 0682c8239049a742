"""`qlora-runtime classify | rate | tag | answer`, and what info and verify say of such bundles."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from qlora_runtime.cli import main
from tiny_tasks import CONTEXT, LABELS, QUESTIONS, SENTENCES, TEXTS

from .test_manifest import edit_json
from .test_task_manifest import rewrite_manifest


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()  # what the making of the bundle said
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(text):
    return [json.loads(line) for line in text.split("\n") if line]


def test_classify_one_text_and_one_pair(capsys, task_bundle):
    bundle = task_bundle("bert classifies")
    code, out, err = run(capsys, "classify", bundle.directory, "--text", TEXTS[0], "--threads", 1)
    (row,), (expected,) = read_lines(out), bundle.classify([TEXTS[0]])
    assert (code, err) == (0, "") and row["text"] == TEXTS[0] and row["predicted_label"] == expected.labels[0]
    assert list(row["probabilities"]) == list(LABELS) and row["truncated"] is False
    np.testing.assert_allclose(list(row["probabilities"].values()), expected.probabilities, atol=1e-6)
    first, second = TEXTS[2]
    _, out, _ = run(capsys, "classify", bundle.directory, "--text", first, "--pair", second)
    (expected,) = bundle.classify([(first, second)])
    assert read_lines(out)[0]["probability"] == pytest.approx(max(expected.probabilities), abs=1e-6)


def test_classify_a_csv_file_into_another(capsys, task_bundle, tmp_path):
    texts = [text for text in TEXTS if isinstance(text, str)]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "review"], *enumerate(texts)])
    bundle = task_bundle("distilbert gives several labels")
    files = ["--input", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--column", "text=review"]
    assert run(capsys, "classify", bundle.directory, *files, "--batch-size", 2) == (0, "", "")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["review"]) for row in rows] == [(str(k), text) for k, text in enumerate(texts)]
    for row, expected in zip(rows, bundle.classify(texts), strict=True):
        assert tuple(json.loads(row["predicted_labels"])) == expected.labels


def test_a_reader_that_leaves_is_told_nothing(task_bundle, tmp_path):
    rows = write_lines(tmp_path / "in.jsonl", [{"text": TEXTS[0]}])
    bundle = task_bundle("bert classifies").directory
    command = [sys.executable, "-m", "qlora_runtime.cli", "classify", str(bundle), "--input", str(rows)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `head -0` does
        assert process.stderr.read() == b"" and process.wait(60) == 2


def test_rate_a_file(capsys, task_bundle, tmp_path):
    texts = [{"text": text} for text in TEXTS if isinstance(text, str)]
    path = write_lines(tmp_path / "in.jsonl", texts)
    bundle = task_bundle("llama rates")
    _, out, _ = run(capsys, "rate", bundle.directory, "--input", path)
    expected = [result.value for result in bundle.rate(row["text"] for row in texts)]
    assert [row["predicted_value"] for row in read_lines(out)] == pytest.approx(expected)


def test_tag_words_and_raw_text(capsys, task_bundle, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"words": SENTENCES[0], "id": 7}, {"text": "the road, the sky"}])
    bundle = task_bundle("bert tags")
    _, out, _ = run(capsys, "tag", bundle.directory, "--input", path)
    rows = read_lines(out)
    for row, expected in zip(rows, bundle.tag([SENTENCES[0], "the road, the sky"]), strict=True):
        assert row["predicted_tags"] == list(expected.tags)
        assert [span["text"] for span in row["predicted_spans"]] == [span.text for span in expected.spans]
    assert rows[0]["id"] == 7 and rows[1]["predicted_words"] == ["the", "road", ",", "the", "sky"]
    _, out, _ = run(capsys, "tag", bundle.directory, "--text", "the road, the sky")
    assert read_lines(out)[0]["predicted_tags"] == rows[1]["predicted_tags"]


def test_answer_a_question_and_a_file(capsys, task_bundle, tmp_path):
    bundle = task_bundle("bert answers")
    rows = [{"question": question, "context": context} for question, context in QUESTIONS]
    path = write_lines(tmp_path / "in.jsonl", rows)
    _, out, _ = run(capsys, "answer", bundle.directory, "--input", path)
    answers = read_lines(out)
    for row, answer, expected in zip(rows, answers, bundle.answer(QUESTIONS), strict=True):
        assert answer["predicted_answer"] == expected.text
        assert row["context"][answer["answer_start"] : answer["answer_end"]] == expected.text
        assert answer["answer_score"] == pytest.approx(expected.score, abs=1e-6)
    _, out, _ = run(capsys, "answer", bundle.directory, "--question", QUESTIONS[0][0], "--context", CONTEXT)
    assert read_lines(out)[0]["predicted_answer"] == answers[0]["predicted_answer"]


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("tag", ["--text", "a"], "WrongTaskError: tag needs a bundle for tagging;"),
        ("answer", ["--question", "a", "--context", "b"], "answer needs a bundle for question_answering"),
        ("generate", ["--prompt", "a"], "is a bundle for classification, which does not generate"),
        ("classify", [], "give either --input, or --text and --pair"),
        ("classify", ["--text", "a", "--input", "b.csv"], "give either --input, or --text"),
        ("classify", ["--pair", "a"], "the command line: no column 'text' among ['pair'], expected text"),
        ("classify", ["--text", "a", "--column", "text"], "--column text: expected FIELD=COLUMN, such as"),
        ("classify", ["--input", "rows.txt"], "rows.txt: the ending is '.txt', allowed are .csv, .tsv and .jsonl"),
        ("classify", ["--text", "a", "-o", "out.txt"], "out.txt: the ending is '.txt'"),
        ("classify", ["--text", "a", "--batch-size", "0"], "batch_size is 0, at least 1 is expected"),
    ],
)
def test_wrong_use_is_exit_code_2(capsys, task_bundle, verb, options, message):
    code, _, err = run(capsys, verb, task_bundle("bert classifies").directory, *options)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"text": "a"}\n[1]\n', "in.jsonl, line 2: expected an object, got [1]"),
        ("in.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "in.jsonl, line 3: text is 3, expected text"),
        ("in.jsonl", "{", "in.jsonl, line 1: not JSON"),
        ("in.csv", "text,b\na\n", "in.csv, line 2: the row has not as many cells as the header has columns"),
        ("in.csv", "b\na\n", "in.csv, line 2: no column 'text' among ['b'], expected text. Name the column with"),
        ("in.csv", b"text\n\xff\n", "in.csv, from line 1 on: not UTF-8"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_written(capsys, task_bundle, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    target = tmp_path / "out.jsonl"
    code, _, err = run(capsys, "classify", task_bundle("bert classifies").directory, "--input", path, "-o", target)
    assert code == 2 and message in err and not target.exists()


def test_words_that_are_none_are_named(capsys, task_bundle, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"words": "a b"}])
    code, _, err = run(capsys, "tag", task_bundle("bert tags").directory, "--input", path)
    assert code == 2 and "in.jsonl, line 1: words is a b, expected a list of words" in err


def test_info_and_verify(capsys, task_bundle, task_dir):
    directory = task_bundle("bert tags").directory
    code, out, _ = run(capsys, "info", directory)
    assert code == 0 and '"type": "tagging"' in out and "passed verification" in out
    code, out, _ = run(capsys, "verify", directory, "--threads", 1)
    assert code == 0 and "same decisions" in out and out.endswith("PASSED\n")

    def damage(value):
        value["rows"][0]["logits"][0] = [9.0, 0.0, -9.0]

    edit_json(task_dir / "reference.json", damage)
    rewrite_manifest(task_dir)
    code, out, _ = run(capsys, "verify", task_dir, "--json")
    report = json.loads(out)
    assert code == 1 and report["passed"] is False and "a logit differs by" in report["reasons"][0]
    code, _, err = run(capsys, "classify", task_dir, "--text", "a")
    assert code == 0 and "warning: this bundle has not been verified" in err
