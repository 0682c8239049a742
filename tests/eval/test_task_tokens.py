"""`eval` and `predict` of tags, found answers and generated texts: the same as plain transformers, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_runtime.task_bundle import TaskBundle
from qlora_runtime.words import unread_tag
from rich.console import Console
from sacrebleu.metrics import BLEU
from seqeval.metrics import classification_report
from seqeval.metrics import f1_score as span_f1
from tiny_encoders import save_tiny_encoder, task_rows, write_jsonl
from tiny_task_runs import tiny_bert, train_task

from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.predict import predict
from qlora_kit.eval.results import EvalResults
from qlora_kit.eval.run import evaluate_run
from qlora_kit.export.run import export_run
from qlora_kit.train.restore import load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder

__all__ = ["tiny_bert"]
QUIET = Console(quiet=True)
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def predicted(run: RunFolder, rows: list[Any], form: str = "tuned", ending: str = ".jsonl") -> list[dict[str, Any]]:
    asked, output = write_jsonl(run.path / "in.jsonl", rows), run.path / f"{form}{ending}"
    predict(run, str(asked), output, QUIET, form=form, overwrite=True)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def answers_of(results: EvalResults, form: str = "tuned") -> list[Any]:
    return results.forms[form].per_row.answer or []


def test_tags_and_spans(tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = task_rows("tagging", 40)
    run = train_task(tmp_path, tiny_bert, {"type": "tagging"}, rows[:24], rows[24:])
    results = evaluate_run(run, Console(width=200))
    model, tokenizer = load_tuned(run), load_run_tokenizer(run)
    labels, expected = run.manifest()["task"]["labels"], [row["tags"] for row in rows[24:]]
    answers = answers_of(results)
    for row, tags in zip(rows[24:], answers, strict=True):
        encoded = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        words = encoded.word_ids()
        assert tags == [labels[best[words.index(word)]] for word in range(len(row["words"]))]
    tuned = results.forms["tuned"]
    assert list(tuned.scores) == ["span_f1", "word_accuracy"] and results.metrics["references"] == expected
    assert tuned.scores["span_f1"].value == pytest.approx(span_f1(expected, answers, zero_division=0))
    report = classification_report(expected, answers, digits=4, zero_division=0)
    assert report == tuned.details["report"] and report.splitlines()[0] in capsys.readouterr().out
    assert {pair.metric for pair in results.pairs} == {"span_f1", "word_accuracy"}
    found = predicted(run, [{"words": row["words"], "n": k} for k, row in enumerate(rows[24:])])
    assert [row["predicted_tags"] for row in found] == answers and [row["n"] for row in found] == list(range(16))
    for row in found:
        starts = sum(
            tag != "O" and (tag[0] == "B" or before[2:] != tag[2:])
            for before, tag in zip(["O", *row["predicted_tags"]], row["predicted_tags"])
        )
        assert len(row["predicted_spans"]) == starts
        for span in row["predicted_spans"]:
            assert row["words"][span["start"] : span["end"]] == span["words"]


@pytest.mark.parametrize("overlong", ["truncate", "error"])
def test_a_long_sentence_is_tagged_whole_as_its_bundle_does(tmp_path: Path, tiny_bert: Path, overlong: str) -> None:
    rows = task_rows("tagging", 30)
    long = [{name: cells * 6 for name, cells in row.items()} for row in rows[20:]]
    data = {"max_seq_len": 40, "overlong": overlong}
    held_out = long if overlong == "truncate" else rows[20:]
    run = train_task(
        tmp_path, tiny_bert, {"type": "tagging"}, rows[:20], held_out, data=data, train={"max_steps": 60, "lr": 0.01}
    )
    found = [row["predicted_tags"] for row in predicted(run, [{"words": row["words"]} for row in long])]
    assert any(set(tags[38:]) - {"O"} for tags in found), "words behind the first window have tags of their own"
    export_run(run, QUIET, ["fp32"])
    bundle = TaskBundle.open(run.bundles / "fp32")
    assert found == [list(tagged.tags) for tagged in bundle.tag([row["words"] for row in long])]
    if overlong == "truncate":
        results = evaluate_run(run, QUIET, ["tuned", "bundle_fp32"])
        assert answers_of(results) == answers_of(results, "bundle_fp32") == found
        assert results.forms["tuned"].per_row.loss_tokens == [len(row["words"]) for row in long]


def test_a_sentence_longer_than_the_models_positions(tmp_path: Path, tiny_bert: Path) -> None:
    rows = task_rows("tagging", 30)
    run = train_task(tmp_path, tiny_bert, {"type": "tagging"}, rows[:20], rows[20:], data={"max_seq_len": 1024})
    words = rows[20]["words"] * 30
    [found] = predicted(run, [{"words": words}])
    export_run(run, QUIET, ["fp32"])
    [tagged] = TaskBundle.open(run.bundles / "fp32").tag([words])
    assert found["predicted_tags"] == list(tagged.tags)
    assert predicted(run, [{"words": words}], "bundle_fp32") == [found]


def test_raw_texts_of_a_csv_are_tagged_as_the_bundle_tags_them(tmp_path: Path, tiny_bert: Path) -> None:
    rows = task_rows("tagging", 30)
    run = train_task(
        tmp_path, tiny_bert, {"type": "tagging"}, rows[:20], rows[20:], data={"columns": {"words": "words"}}
    )
    texts = ["Anna sold boats, in Lisbon.", "She counted: seven!"]
    (tmp_path / "asked.csv").write_text("n,text\n" + "".join(f'{k},"{text}"\n' for k, text in enumerate(texts)))
    predict(run, str(tmp_path / "asked.csv"), tmp_path / "out.jsonl", QUIET)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    export_run(run, QUIET, ["fp32"])
    for row, tagged in zip(found, TaskBundle.open(run.bundles / "fp32").tag(texts), strict=True):
        assert row["predicted_words"] == [word.text for word in tagged.words]
        assert row["predicted_tags"] == list(tagged.tags)
        assert [(span["type"], "".join(span["words"])) for span in row["predicted_spans"]] == [
            (span.type, span.text.replace(" ", "")) for span in tagged.spans
        ]


def test_plain_tags(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [row | {"tags": [tag[-3:] for tag in row["tags"]]} for row in task_rows("tagging", 30)]
    run = train_task(tmp_path, tiny_bert, {"type": "tagging", "scheme": "plain"}, rows[:20], rows[20:])
    tuned = evaluate_run(run, QUIET, ["tuned"]).forms["tuned"]
    pairs = [pair for tags, row in zip(tuned.per_row.answer or [], rows[20:]) for pair in zip(tags, row["tags"])]
    assert tuned.scores["word_accuracy"].value == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    whole = compute_metric("f1", predictions=[a for a, _ in pairs], references=[b for _, b in pairs])
    assert tuned.scores["f1_macro"].value == pytest.approx(whole["f1_macro"])
    assert set(predicted(run, [{"words": ["a", "sea"]}])[0]) == {"words", "predicted_tags"}


def question_rows(count: int) -> list[dict[str, Any]]:
    """Some contexts longer than a window; every fourth question without an answer."""
    rows = task_rows("question_answering", count)
    for k, row in enumerate(rows):
        if k % 3 == 0:
            row["context"] += " the river ran under it to the sea" * 6
        if k % 4 == 3:
            row["answers"] = []
    return rows


@pytest.mark.parametrize("unanswerable", [False, True])
def test_found_answers(tmp_path: Path, tiny_bert: Path, unanswerable: bool) -> None:
    rows = [row for row in question_rows(40) if unanswerable or row["answers"]]
    task = {"type": "question_answering", "stride": 8, "unanswerable": unanswerable, "max_answer_tokens": 4}
    run = train_task(tmp_path, tiny_bert, task, rows[:20], rows[20:], data={"max_seq_len": 32})
    results = evaluate_run(run, QUIET)
    tuned, held_out = results.forms["tuned"], rows[20:]
    assert results.rows == len(held_out), "windows of one question are one row"
    assert max(tuned.per_row.loss_tokens) > 2, "some contexts take several windows"
    name = "squad_v2" if unanswerable else "squad"
    references = [[answer["text"] for answer in row["answers"]] for row in held_out]
    whole = compute_metric(name, predictions=answers_of(results), references=references)
    for score in tuned.scores:
        assert tuned.scores[score].value == pytest.approx(whole.get(score, whole["exact_match"])) or "no" in score
    assert ("no_answer_exact_match" in tuned.scores) == unanswerable
    found = predicted(run, [{name: row[name] for name in ("question", "context")} for row in held_out])
    assert [row["predicted_answer"] for row in found] == answers_of(results)
    for row in found:
        start, text = row["answer_start"], row["predicted_answer"]
        assert row["context"][start : start + len(text)] == text and 0 <= row["answer_score"] <= 1


def test_an_answer_is_the_best_span_of_plain_transformers(tmp_path: Path, tiny_bert: Path) -> None:
    rows = task_rows("question_answering", 30)
    task = {"type": "question_answering", "max_answer_tokens": 3}
    run = train_task(tmp_path, tiny_bert, task, rows[:20], rows[20:])
    model, tokenizer = load_tuned(run), load_run_tokenizer(run)
    for row in predicted(run, rows[20:]):
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, sequences = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids()
        with torch.no_grad():
            out = model(**encoded)
        spans = {
            (a, b): float(out.start_logits[0, a] + out.end_logits[0, b])
            for a in range(len(sequences))
            for b in range(a, min(a + 3, len(sequences)))
            if sequences[a] == sequences[b] == 1
        }
        a, b = max(spans, key=lambda span: spans[span])
        assert row["predicted_answer"] == row["context"][offsets[a][0] : offsets[b][1]]
        assert row["answer_start"] == offsets[a][0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tagging", "question_answering"])
def test_bundles_answer_as_the_tuned_model(tmp_path: Path, tiny_bert: Path, task: str) -> None:
    rows = task_rows(task, 40)
    run = train_task(tmp_path, tiny_bert, {"type": task}, rows[:24], rows[24:])
    export_run(run, QUIET, ["fp32"])
    results = evaluate_run(run, QUIET, ["tuned", "merged", "bundle_fp32"])
    tuned = results.forms["tuned"].per_row
    for form in ("merged", "bundle_fp32"):
        assert answers_of(results, form) == tuned.answer
        assert results.forms[form].per_row.loss == pytest.approx(tuned.loss, abs=1e-3)
    sides = [predicted(run, rows[24:], form) for form in ("tuned", "bundle_fp32")]
    for name in ("predicted_tags", "predicted_answer"):
        assert [row.get(name) for row in sides[0]] == [row.get(name) for row in sides[1]]


def test_a_word_without_tokens_has_one_tag_by_all_ways(tmp_path: Path, tiny_bert: Path) -> None:
    """O, though it is not the first label; eval, predict and the bundle agree."""
    rows = task_rows("tagging", 30)
    types = sorted({tag[2:] for row in rows for tag in row["tags"]} - {""})
    labels = [*(f"{mark}-{kind}" for kind in types for mark in "BI"), "O"]
    broken = {"words": [*rows[24]["words"], "\x01"], "tags": [*rows[24]["tags"], "O"]}
    held_out = [broken, *rows[25:]]
    run = train_task(tmp_path, tiny_bert, {"type": "tagging", "labels": labels}, rows[:24], held_out)
    export_run(run, QUIET)
    results = evaluate_run(run, QUIET, ["tuned", "bundle_fp32"])
    assert answers_of(results)[0][-1] == "O" and answers_of(results) == answers_of(results, "bundle_fp32")
    assert predicted(run, [broken])[0]["predicted_tags"][-1] == "O"
    [tagged] = TaskBundle.open(run.bundles / "fp32").tag([broken["words"]])
    assert (tagged.tags[-1], tagged.scores[-1]) == ("O", 0.0) and list(tagged.tags) == answers_of(results)[0]
    assert unread_tag(["NOUN", "VERB"]) == "NOUN"


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generated_texts(tmp_path: Path, kind: str) -> None:
    rows = task_rows("seq2seq", 30)
    task = {"type": "seq2seq", "source_prefix": "turn : ", "max_target_len": 16}
    changes = {"adapter": {"target_modules": "all-linear"}, "eval": {"max_new_tokens": 8}}
    run = train_task(tmp_path, save_tiny_encoder(tmp_path / "model", kind), task, rows[:20], rows[20:], **changes)
    results = evaluate_run(run, QUIET)
    tuned, targets = results.forms["tuned"], [row["target"] for row in rows[20:]]
    assert results.metrics["references"] == [[target] for target in targets]
    assert list(tuned.scores) == ["bleu", "nist", "meteor_exact_stem", "chrf", *KINDS, "exact_match"]
    answers = answers_of(results)
    assert tuned.scores["bleu"].value == pytest.approx(BLEU().corpus_score(answers, [targets]).score)
    model, tokenizer = load_tuned(run), load_run_tokenizer(run)
    for row, answer in zip(rows[20:], answers, strict=True):
        ids = tokenizer(f"turn : {row['source']}", return_tensors="pt")
        said = torch.tensor([[model.config.decoder_start_token_id]])
        while (said.shape[1] < 9 and said[0, -1] != tokenizer.eos_token_id) or said.shape[1] == 1:
            with torch.no_grad():
                logits = model(**ids, decoder_input_ids=said).logits[0, -1]
            said = torch.cat([said, logits.argmax().view(1, 1)], dim=1)
        assert tokenizer.decode(said[0], skip_special_tokens=True).strip() == answer
    found = predicted(run, [{"source": row["source"]} for row in rows[20:]])
    assert [row["generated_text"] for row in found] == answers
