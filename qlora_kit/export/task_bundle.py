"""Makes a bundle of a task that does not generate: graph, tokenizer, reference, and a manifest with the proof in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_runtime import ModelInfo, Provenance, TaskBundle, Verification, write_manifest
from qlora_runtime.task import TaskInfo
from qlora_runtime.task_reference import write_task_reference
from transformers import PreTrainedTokenizerBase

from qlora_kit.export.bundle import published
from qlora_kit.export.parameters import Factors
from qlora_kit.export.task_graph import build_task_graph
from qlora_kit.export.task_proof import TaskDistances, TaskProofRow, prove, recorded, shipped, tolerance_of
from qlora_kit.model.source import sha256_file


@dataclass(frozen=True)
class TaskModel:
    """What a bundle is made of.

    Attributes:
        auto_class: the Auto class of transformers that reads the merged folder.
        context_length: the most tokens that the model can read.
        rows: the trained model's logits on the rows of the proof.
    """

    task: TaskInfo
    auto_class: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    rows: Sequence[TaskProofRow]


def make_task_bundle(
    merged: Path,
    target: Path,
    profile: str,
    model: TaskModel,
    base: Any,
    adapter: Any,
    tools: Any,
    factors: Factors | None = None,
) -> TaskDistances:
    """Builds and verifies a bundle of the merged model; arguments and errors as for `make_bundle`."""

    def build(folder: Path) -> tuple[TaskDistances, list[str]]:
        build_task_graph(merged, folder, profile, model.auto_class, model.tokenizer, factors)
        tolerance = tolerance_of(profile, model.task, model.rows)
        write_task_reference(folder, shipped(model.rows, tolerance))
        about: dict[str, Any] = {
            "profile": profile,
            "model": _model_info(folder, model),
            "provenance": Provenance(base, adapter, sha256_file(merged / "tokenizer.json"), None),
            "tools": tools,
            "task": model.task,
        }
        write_manifest(folder, verification=None, **about)
        found = prove(TaskBundle.open(folder), model.rows, tolerance)
        verification = Verification(found.report.passed, recorded(tolerance), found.to_json())
        write_manifest(folder, verification=verification, **about)
        return found, found.report.reasons

    return published(target, profile, build)


def _model_info(folder: Path, model: TaskModel) -> ModelInfo:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelInfo(
        architecture=config["architectures"][0],
        vocab_size=config["vocab_size"],
        context_length=model.context_length,
        eos_token_ids=(),
        pad_token_id=model.tokenizer.pad_token_id,
    )
