"""`eval` and `predict` of images and sounds on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_encoders import write_jsonl
from tiny_media import media_recipe, save_tiny_image_model, save_tiny_whisper, trained, write_images, write_tones

from qlora_kit.data.examples import content_hash, row_hash
from qlora_kit.data.task_examples import LabelledImage, LabelledText, Utterance
from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.predict import predict
from qlora_kit.eval.run import evaluate_run

QUIET = Console(quiet=True)


def test_images(tmp_path: Path) -> None:
    folders = [write_images(tmp_path / name, 3, seed) for seed, name in enumerate(("train", "held-out"))]
    data = {"train": str(folders[0]), "eval": str(folders[1])}
    changes = {"train": {"max_steps": 2}}
    run = trained(
        media_recipe(tmp_path, "image_classification", save_tiny_image_model(tmp_path / "m"), data, **changes)
    )
    tuned = evaluate_run(run, QUIET).forms["tuned"]
    files = sorted(path for path in folders[1].rglob("*") if path.is_file())
    expected = [path.parent.name for path in files]
    assert tuned.scores["accuracy"].value == pytest.approx(
        np.mean([a == b for a, b in zip(tuned.per_row.answer or [], expected, strict=True)])
    )
    asked = write_jsonl(tmp_path / "in.jsonl", [{"image": str(path)} for path in files])
    predict(run, str(asked), tmp_path / "out.jsonl", QUIET)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["predicted_label"] for row in rows] == tuned.per_row.answer


def test_rows_of_images_and_sounds_are_their_files_bytes(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("a.png", "b.png"))
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    same = row_hash(LabelledImage(str(first), "cat")), row_hash(LabelledImage(str(second), "cat"))
    assert same[0] == same[1] != row_hash(LabelledImage(str(first), "dog"))
    assert row_hash(Utterance(str(first), "hello")) == row_hash(Utterance(str(second), "hello"))
    second.write_bytes(b"two")
    assert row_hash(LabelledImage(str(second), "cat")) != same[0]
    assert row_hash(Utterance(str(second), "hello")) != row_hash(Utterance(str(first), "hello"))
    text = LabelledText("a film", None, "good")
    assert row_hash(text) == f"{content_hash(text):016x}"


def test_sounds(tmp_path: Path) -> None:
    manifests = [write_tones(tmp_path / name, 3, seed=seed) for seed, name in enumerate(("train", "held-out"))]
    data = {"train": str(manifests[0]), "eval": str(manifests[1])}
    changes = {"train": {"max_steps": 2}, "task": {"max_target_len": 16}, "eval": {"max_new_tokens": 6}}
    run = trained(media_recipe(tmp_path, "speech_recognition", save_tiny_whisper(tmp_path / "m"), data, **changes))
    results = evaluate_run(run, QUIET, ["tuned"])
    tuned = results.forms["tuned"]
    whole = compute_metric("wer", predictions=tuned.per_row.answer, references=results.metrics["references"])
    assert tuned.scores["wer"].value == pytest.approx(whole["wer"])
    predict(run, str(manifests[1]), manifests[1].parent / "out.jsonl", QUIET)
    lines = (manifests[1].parent / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["generated_text"] for line in lines] == tuned.per_row.answer
