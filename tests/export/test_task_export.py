"""`qlora-kit export` of runs whose task is not to generate: from training to the runtime's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_runtime import TaskBundle, read_manifest, sha256_file, verify_directory
from tiny_run import changed_copy, write_rows
from tiny_tasks import CONTEXT, SENTENCES, TASKS, save_task_model, task_tokenizer

from qlora_kit.cli import main
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import ExportError
from qlora_kit.export.rows import proof_rows
from qlora_kit.export.task_proof import bundled_task, task_rows
from qlora_kit.model.load import to_reference
from qlora_kit.task_settings import ImageClassificationSettings
from qlora_kit.tasks.registry import task_of
from qlora_kit.train.restore import load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder

WORDS = [
    "bridge",
    "stone",
    "iron",
    "river",
    "sea",
    "morning",
    "ferryman",
    "coins",
    "boats",
    "bread",
    "salt",
    "lamp",
    "oil",
    "rope",
]
ANSWERS = ("stone and iron", "the ferryman", "the list", "his coins")


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": " ".join(WORDS[k % 7 : k % 7 + 2 + k % 5]), "label": ("bad", "good")[k % 2]} for k in range(count)]


def ratings(count: int) -> list[dict[str, Any]]:
    return [{"sentence1": WORDS[k % 9], "sentence2": row["text"], "score": k / 4} for k, row in enumerate(texts(count))]


def sentences(count: int) -> list[dict[str, Any]]:
    tags = ("O", "B-thing", "I-thing")
    chosen = [SENTENCES[0], SENTENCES[2], SENTENCES[2][3:9]]
    return [
        {"words": [*chosen[k % 3], f"{k}"], "tags": [tags[place % 3] for place in range(len(chosen[k % 3]) + 1)]}
        for k in range(count)
    ]


def questions(count: int) -> list[dict[str, Any]]:
    rows = []
    for k in range(count):
        answer = ANSWERS[k % 4]
        answers = [{"text": answer, "answer_start": CONTEXT.index(answer)}]
        rows.append({"id": str(k), "question": f"what is it {k}?", "context": CONTEXT, "answers": answers})
    return rows


RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # of which tiny model, rows, task
    "classification": ("bert classifies", texts, {"type": "classification"}),
    "regression of a decoder": ("llama rates", ratings, {"type": "regression"}),
    "tagging": ("bert tags", sentences, {"type": "tagging"}),
    "question answering": (
        "roberta answers or not",
        questions,
        {"type": "question_answering", "stride": 8, "max_answer_tokens": 6},
    ),
}


def trained(folder: Path, kind: str) -> Path:
    name, rows, task = RUNS[kind]
    model = save_task_model(folder / "model", TASKS[name])
    recipe = {
        "run": {"name": "tiny", "out_dir": str(folder / "runs")},
        "base": {"model": str(model)},
        "task": task,
        "adapter": {"rank": 4},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows(24))),
            "eval": str(write_rows(folder / "eval.jsonl", rows(40)[24:])),
            "max_seq_len": 40,
        },
        "train": {"optimizer": "adamw", "lr": 0.02, "max_steps": 4, "micro_batch_size": 4, "threads": 1},
        "export": {"profiles": ["fp32"], "verify_prompts": 8},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml"), "--quiet"]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; only to be read."""
    return trained(tmp_path_factory.mktemp("classifier"), "classification")


def test_a_run_that_classifies_is_exported_and_says_what_was_trained(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(classifier, tmp_path / "run")
    assert main(["export", str(run)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "verified on 8 rows: largest logit difference" in said and "decisions 8 of 8 equal" in said

    bundle, opened = TaskBundle.open(run / "bundles" / "fp32"), RunFolder.open(run)
    model, tokenizer = to_reference(load_tuned(opened)), load_run_tokenizer(opened)
    rows = [row["text"] for row in texts(40)]
    for text, found in zip(rows, bundle.classify(rows)):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert found.labels == (("bad", "good")[int(logits.argmax())],)
        torch.testing.assert_close(
            torch.from_numpy(found.probabilities), logits.double().softmax(-1), atol=1e-5, rtol=0
        )

    manifest = read_manifest(run / "bundles" / "fp32")
    assert manifest.task is not None and manifest.task.type == "classification"
    assert manifest.model.architecture == "BertForSequenceClassification" and manifest.verification is not None
    assert manifest.provenance.adapter is not None
    assert manifest.provenance.adapter["sha256"] == sha256_file(run / "adapter" / "adapter_model.safetensors")
    assert manifest.verification.distances["training_rows"] == 0 and "onnxscript" in manifest.tools
    for file in (run / "bundles" / "fp32").rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            assert str(classifier.parents[1]).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "classification"])
def test_every_task_is_exported_and_verifies(tmp_path: Path, kind: str) -> None:
    run = trained(tmp_path, kind)
    assert main(["export", str(run)]) == 0
    folder = run / "bundles" / "fp32"
    verification = read_manifest(folder).verification
    assert verification is not None and verification.passed
    distances = verification.distances
    assert distances["decisions_equal"] == distances["decisions"] and distances["rows"] >= 8
    assert (distances["decisions"] > 0) == (kind != "regression of a decoder")
    assert verify_directory(folder).passed


def test_another_tokenizer_than_in_training_is_noticed(classifier: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", [{"text": "The BRIDGE", "label": "bad"}, *texts(24)])
    run = RunFolder.open(changed_copy(classifier, tmp_path / "run", data={"train": str(rows)}))
    section, task, model = run.recipe().data, run_task(run), to_reference(load_tuned(run))
    chosen = proof_rows(prepare(section, load_run_tokenizer(run), 0, task), 40)
    tokenizer = task_tokenizer("bert")
    tokenizer.backend_tokenizer.normalizer = None  # upper case is then unknown
    info = bundled_task(task, section, model)
    with pytest.raises(ExportError, match=r"row 1 of the proof has other tokens in the runtime than it had in tr"):
        task_rows(model, task, info, chosen, section, tokenizer)


def test_a_task_without_bundles_is_refused(classifier: Path) -> None:
    run = RunFolder.open(classifier)
    images = task_of(ImageClassificationSettings(), ["a", "b"])
    with pytest.raises(ExportError, match=r"task.type image_classification has no bundles. Allowed: causal_lm, class"):
        bundled_task(images, run.recipe().data, load_tuned(run))
