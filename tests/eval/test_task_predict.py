"""`qlora-kit predict` on tiny runs: the model's own answers, in the input's order, whole after any kill."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_encoders import write_jsonl
from tiny_run import changed_copy
from tiny_task_runs import label_rows, label_run, sentence, tiny_bert
from transformers import AutoTokenizer

from qlora_kit.cli import main
from qlora_kit.data.sources import read_rows
from qlora_kit.errors import DataError, EvalError, RunError
from qlora_kit.eval.predict import predict
from qlora_kit.model.load import to_reference
from qlora_kit.recipe import DataSource
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

__all__ = ["label_run", "tiny_bert"]
QUIET = Console(quiet=True)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """70 texts without labels, some with line breaks and quotes, as CSV."""
    path = tmp_path / "texts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        for k in range(70):
            writer.writerow([k, sentence(k) + ("", ' "né\nsea"', ", salt")[k % 3]])
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_answered_as_plain_transformers_does(label_run: RunFolder, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    assert main(["predict", str(label_run.path), f"--input={texts}", f"--output={output}", "--batch-size=3"]) == 0
    model, tokenizer = load_tuned(label_run), AutoTokenizer.from_pretrained(label_run.tokenizer)
    labels = label_run.manifest()["task"]["labels"]
    found = rows_in(output)
    assert [row["id"] for row in found] == [str(k) for k in range(70)]
    for row, asked in zip(found, rows_in(texts), strict=True):
        assert row["text"] == asked["text"], "the input's own columns stay"
        with torch.no_grad():
            probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert row["predicted_label"] == labels[int(probabilities.argmax())]
        for label, probability in zip(labels, probabilities.tolist(), strict=True):
            assert float(row[f"probability_{label}"]) == pytest.approx(probability, abs=2e-6)
        assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=2e-6)


def test_columns_of_other_names(
    label_run: RunFolder, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, output = tmp_path / "other.csv", tmp_path / "out.csv"
    other.write_text(texts.read_text(encoding="utf-8").replace("id,text", "id,said", 1), encoding="utf-8")
    command = ["predict", str(label_run.path), f"--input={other}", f"--output={output}"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no column for 'text'" in said and "data.columns (predict: --column), for example {text: id}" in said
    assert main([*command, "--column", "text=said"]) == 0
    predict(label_run, str(texts), tmp_path / "usual.csv", QUIET)
    answers = [[row["predicted_label"] for row in rows_in(path)] for path in (output, tmp_path / "usual.csv")]
    assert answers[0] == answers[1]
    assert list(rows_in(output)[0])[:2] == ["id", "said"], "the input's own names stay"
    assert main([*command, "--column", "text=id"]) == 2, "an output of other columns is not gone on with"
    assert "belongs to another columns" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main([*command, "--column", "text"])
    assert "expected EXPECTED=ACTUAL, such as text=review, got 'text'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_killed_call_goes_on_to_the_same_bytes(
    label_run: RunFolder, texts: Path, tmp_path: Path, ending: str
) -> None:
    whole = tmp_path / f"whole{ending}"
    assert predict(label_run, str(texts), whole, QUIET, batch_size=1).rows == 70
    expected, made_by = whole.read_bytes(), whole.with_name(f"{whole.name}.made-by.json").read_bytes()
    for cut in (5, len(expected) // 2, len(expected) - 1, len(expected)):
        torn = tmp_path / f"torn{cut}{ending}"
        torn.write_bytes(expected[:cut])
        torn.with_name(f"{torn.name}.made-by.json").write_bytes(made_by)
        done = predict(label_run, str(texts), torn, QUIET, batch_size=1)
        assert torn.read_bytes() == expected and done.kept + done.rows == 70
    assert done.kept == 70 and done.rows == 0


@pytest.mark.slow
def test_a_process_that_is_killed(label_run: RunFolder, tmp_path: Path) -> None:
    asked = write_jsonl(tmp_path / "in.jsonl", [{"text": sentence(k)} for k in range(400)])
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = [sys.executable, "-m", "qlora_kit.cli", "predict", str(label_run.path), "--input", str(asked)]
    process = subprocess.Popen([*words, "--output", str(output), "--batch-size=1"])
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(output.read_bytes().splitlines())
    predict(label_run, str(asked), output, QUIET, batch_size=1)
    predict(label_run, str(asked), whole, QUIET, batch_size=1)
    assert 0 < kept < 400 and output.read_bytes() == whole.read_bytes()


def test_bad_rows_stop_or_are_counted(label_run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    asked = tmp_path / "in.jsonl"
    asked.write_text('{"text": "a sea"}\n{"text": ""}\nbroken\n{"text": "a bridge"}\n', encoding="utf-8")
    output = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"in\.jsonl row 2: text is empty\. Mend.*such rows: --bad-rows skip"):
        predict(label_run, str(asked), output, QUIET)
    done = predict(label_run, str(asked), output, Console(width=200), bad_rows="skip", overwrite=True)
    assert done.rows == 2 and done.skipped == {"empty text": 1, "broken JSON": 1}
    assert [row["text"] for row in rows_in(output)] == ["a sea", "a bridge"]
    assert "1 rows left out (broken JSON)" in capsys.readouterr().out
    again = predict(label_run, str(asked), output, QUIET, bad_rows="skip")
    assert (again.kept, again.rows) == (2, 0)


def test_skip_goes_on_where_a_bad_row_stopped(label_run: RunFolder, tmp_path: Path) -> None:
    texts = [sentence(k) for k in range(40)] + ["", "a bridge"]
    asked = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(DataError, match=r"in\.jsonl row 41: text is empty"):
        predict(label_run, str(asked), output, QUIET, batch_size=1)
    done = predict(label_run, str(asked), output, QUIET, batch_size=1, bad_rows="skip")
    assert (done.kept, done.rows, done.skipped) == (32, 9, {"empty text": 1})
    predict(label_run, str(asked), whole, QUIET, batch_size=1, bad_rows="skip")
    assert output.read_bytes() == whole.read_bytes()
    with pytest.raises(EvalError, match=r"out\.jsonl belongs to another bad_rows \(got 'skip'\)\. Allowed: error"):
        predict(label_run, str(asked), output, QUIET, batch_size=1)


def test_long_rows_stop_are_left_out_or_cut(label_run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    long = " ".join(["salt"] * 200)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "salt"}, {"text": long}, {"text": "boats"}])
    output = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"row 2: \d+ tokens, more than data.max_seq_len .*--overlong truncate"):
        predict(label_run, str(rows), output, QUIET, batch_size=1)
    assert predict(label_run, str(rows), output, QUIET, batch_size=1, overlong="truncate").rows == 3
    cut = rows_in(output)
    assert [row["text"] for row in cut] == ["salt", long, "boats"], "the text stays whole in the output"
    tokens = AutoTokenizer.from_pretrained(label_run.tokenizer)(
        long, truncation=True, max_length=label_run.recipe().data.max_seq_len, return_tensors="pt"
    )
    with torch.no_grad():
        best = load_tuned(label_run)(**tokens).logits[0].softmax(-1).max()
    assert cut[1]["probability"] == pytest.approx(float(best), abs=2e-6)
    with pytest.raises(EvalError, match="belongs to another overlong"):
        predict(label_run, str(rows), output, QUIET, batch_size=1, overlong="skip")
    left = tmp_path / "left.jsonl"
    assert predict(label_run, str(rows), left, QUIET, overlong="skip").skipped == {"overlong": 1}
    assert len(rows_in(left)) == 2


def test_an_input_without_rows_leaves_nothing_behind(label_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"rows.csv holds no rows"):
        predict(label_run, str(tmp_path / "rows.csv"), tmp_path / "out" / "out.csv", QUIET)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("column", ["text", "more"])
def test_half_a_surrogate_pair_is_a_bad_row(label_run: RunFolder, tmp_path: Path, column: str) -> None:
    half = {"text": "a sea", column: "a \ud800 film"}
    asked = write_jsonl(tmp_path / "in.jsonl", [{"text": "a sea"}, half, {"text": "a bridge"}])
    with pytest.raises(DataError, match=rf"in\.jsonl row 2: '{column}' holds half a surrogate pair \(got '\\ud800'\)"):
        predict(label_run, str(asked), tmp_path / "out.jsonl", QUIET)
    done = predict(label_run, str(asked), tmp_path / "out.jsonl", QUIET, bad_rows="skip")
    assert done.rows == 2 and done.skipped == {"half a surrogate pair": 1}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_odd_cells_are_read_again(label_run: RunFolder, tmp_path: Path, ending: str) -> None:
    odd = [{"text": "a\rfilm", "n": float("nan"), "deep": [float("inf"), 1]}, {"text": "a sea", "n": 2, "deep": {}}]
    asked, output = write_jsonl(tmp_path / "in.jsonl", odd), tmp_path / f"out{ending}"
    predict(label_run, str(asked), output, QUIET)
    again = [row.value for row in read_rows(DataSource.model_validate({"path": str(output)}))]
    assert [(row["text"], row["n"], row["deep"]) for row in again if isinstance(row, dict)] == (
        [("a\rfilm", "", "[null, 1]"), ("a sea", "2", "{}")]
        if ending == ".csv"
        else [("a\rfilm", None, [None, 1]), ("a sea", 2, {})]
    )


def test_outputs_that_are_not_this_calls(label_run: RunFolder, texts: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "out.jsonl", write_jsonl(tmp_path / "other.jsonl", [{"text": "a sea"}])
    predict(label_run, str(other), output, QUIET)
    with pytest.raises(EvalError, match=r"out\.jsonl belongs to another input .*--overwrite"):
        predict(label_run, str(texts), output, QUIET)
    with pytest.raises(EvalError, match=r"out\.jsonl belongs to another form \(got 'tuned'\)\. Allowed: base"):
        predict(label_run, str(other), output, QUIET, form="base")
    predict(label_run, str(texts), output, QUIET, overwrite=True)
    assert len(rows_in(output)) == 70
    foreign = write_jsonl(tmp_path / "mine.jsonl", [{"my": "work"}])
    with pytest.raises(EvalError, match=r"mine\.jsonl exists and does not come from predict"):
        predict(label_run, str(other), foreign, QUIET)
    assert rows_in(foreign) == [{"my": "work"}]
    with pytest.raises(EvalError, match=r"other\.jsonl is the input"):
        predict(label_run, str(other), other, QUIET)
    with pytest.raises(EvalError, match=r"unknown ending .*'\.txt'.*\.csv, \.jsonl"):
        predict(label_run, str(other), tmp_path / "out.txt", QUIET)
    with pytest.raises(EvalError, match=r"there is no folder .*nowhere"):
        predict(label_run, str(other), tmp_path / "nowhere" / "out.csv", QUIET)


def test_forms_that_are_not_there(label_run: RunFolder, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no such form \(got 'bundle_int8'\)\. Allowed: base, tuned\. Export"):
        predict(label_run, str(texts), tmp_path / "out.csv", QUIET, form="bundle_int8")
    unfinished = RunFolder(tmp_path / "run")
    unfinished.path.mkdir()
    for name in ("recipe.yaml", "manifest.json"):
        (unfinished.path / name).write_bytes((label_run.path / name).read_bytes())
    (unfinished.path / "tokenizer").symlink_to(label_run.tokenizer)
    with pytest.raises(RunError, match=r"holds no adapter yet.*train --resume"):
        predict(unfinished, str(texts), tmp_path / "out.csv", QUIET)
    assert not (tmp_path / "out.csv").exists()


def test_columns_that_do_not_fit(label_run: RunFolder, tmp_path: Path) -> None:
    taken = write_jsonl(tmp_path / "taken.jsonl", [{"text": "a sea", "probability": 1}])
    with pytest.raises(EvalError, match=r"taken\.jsonl row 1 has a column of the predictions already.*'probability'"):
        predict(label_run, str(taken), tmp_path / "out.jsonl", QUIET)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "a sea"}, {"text": "a bridge", "more": [1, None]}])
    with pytest.raises(EvalError, match=r"row 2 for .*out\.csv has other columns than the first.*\.jsonl"):
        predict(label_run, str(mixed), tmp_path / "out.csv", QUIET)
    predict(label_run, str(mixed), tmp_path / "mixed-out.jsonl", QUIET)
    assert rows_in(tmp_path / "mixed-out.jsonl")[1]["more"] == [1, None]


def test_labelled_rows_are_answered_without_their_labels(label_run: RunFolder, tmp_path: Path) -> None:
    rows = label_rows(6)
    wrong = [row | {"label": "no such label"} for row in rows]
    for name, asked in (("a", rows), ("b", wrong)):
        predict(label_run, str(write_jsonl(tmp_path / f"{name}.jsonl", asked)), tmp_path / f"{name}-out.jsonl", QUIET)
    answers = [[row["predicted_label"] for row in rows_in(tmp_path / f"{name}-out.jsonl")] for name in "ab"]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rows", ["prompts", "chats", "labelled"])
def test_a_language_model_answers_prompts(trained_run: Path, tmp_path: Path, rows: str) -> None:
    run, asks = RunFolder(trained_run), ["a film by the sea 1?", "seven boats 2?", "lamp oil 3? why why"]
    made: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"n": k, "prompt": ask} for k, ask in enumerate(asks)],
        "labelled": [{"prompt": ask, "completion": "good"} for ask in asks],
        "chats": [{"messages": [{"role": "user", "content": ask}]} for ask in asks],
    }
    asked, output = write_jsonl(tmp_path / "in.jsonl", made[rows]), tmp_path / "out.jsonl"
    if rows == "chats":
        run = RunFolder(changed_copy(trained_run, tmp_path / "run", data={"schema": "messages"}))
    predict(run, str(asked), output, QUIET)
    model, tokenizer = load_tuned(run), AutoTokenizer.from_pretrained(run.tokenizer)
    for ask, row, given in zip(asks, rows_in(output), made[rows], strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = to_reference(model).generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row == given | {"generated_text": tokenizer.decode(said, skip_special_tokens=True)}


def test_prompts_are_not_cut(trained_run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(EvalError, match="a prompt is not cut"):
        predict(RunFolder.open(trained_run), str(rows), tmp_path / "out.jsonl", QUIET, overlong="truncate")


def test_prompts_that_cannot_be_answered(trained_run: Path, tmp_path: Path) -> None:
    asked = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a sea"}, {"prompt": "a sea " * 200}])
    with pytest.raises(DataError, match=r"in\.jsonl row 2: the prompt has \d+ tokens\. Allowed: 1 to 127"):
        predict(RunFolder(trained_run), str(asked), tmp_path / "out.jsonl", QUIET)
    nothing = write_jsonl(tmp_path / "no.jsonl", [{"other": "a sea"}])
    with pytest.raises(DataError, match=r"no\.jsonl row 1: .*prompt"):
        predict(RunFolder(trained_run), str(nothing), tmp_path / "no-out.jsonl", QUIET)
