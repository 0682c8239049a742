"""Finds and loads the teacher that a recipe names, and starts the distillation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.errors import ModelError
from qlora_kit.model.load import DTYPES, load_base, load_tokenizer
from qlora_kit.model.source import BaseSource, find_base
from qlora_kit.recipe import Recipe
from qlora_kit.tasks.head import head_gives_logits
from qlora_kit.train.adapted_model import int4_grid
from qlora_kit.train.distill import Distillation, OnlineTeacher
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.teacher_cache import CachedTeacher


def check_distillable(model: PreTrainedModel, what: str) -> None:
    """Refuses models whose logits are not their head's output: the head is applied to some tokens at a time.

    Raises:
        ModelError: names the model's class.
    """
    if not head_gives_logits(model):
        raise ModelError(
            f"{what}: distillation cannot take {type(model).__name__}: it changes what its output head gives, "
            "by a soft cap, say",
            fix="Remove train.distill, or use a model without it",
        )


def find_teacher(recipe: Recipe, base: BaseSource, tokenizer: PreTrainedTokenizerBase) -> BaseSource:
    """Where the teacher lies; `base` is the run's own base.

    Raises:
        ModelError: there is none, or its tokens are not the student's.
    """
    section = recipe.train.distill
    assert section is not None
    if section.teacher == "base":
        return base
    source = find_base(section.teacher, section.revision, recipe.base.trust_remote_code, field="train.distill.teacher")
    theirs = load_tokenizer(source.folder, recipe.base.trust_remote_code).get_vocab()
    if theirs != tokenizer.get_vocab():
        raise ModelError(
            f"train.distill.teacher {section.teacher} has other tokens than {recipe.base.model}",
            got=f"{len(theirs)} tokens",
            allowed=f"the same {len(tokenizer)} tokens with the same ids",
            fix="Take a teacher of the same family",
        )
    return source


def load_teacher(recipe: Recipe, source: BaseSource, device: torch.device) -> PreTrainedModel:
    """The teacher in the run's compute dtype, frozen, in evaluation mode."""
    section = recipe.train.distill
    assert section is not None
    model = load_base(
        source,
        section.quant,
        compute_dtype=DTYPES[recipe.base.compute_dtype],
        device=device,
        trust_remote_code=recipe.base.trust_remote_code,
        grid=int4_grid(recipe.base),
    )
    check_distillable(model, f"train.distill.teacher {section.teacher}")
    return model


def start_distillation(
    recipe: Recipe,
    run: RunFolder,
    base: BaseSource,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    data_sha256: str,
) -> Distillation | None:
    """The recipe's distillation, its teacher found and, where it is asked at each step, loaded; None without one.

    Raises:
        ModelError: the teacher is not there, or teacher and student do not fit.
    """
    section = recipe.train.distill
    if section is None:
        return None
    check_distillable(student, f"base.model {recipe.base.model}")
    source = find_teacher(recipe, base, tokenizer)
    vocab = cast(Tensor, student.get_input_embeddings().weight).shape[0]

    def load() -> OnlineTeacher:
        return OnlineTeacher(load_teacher(recipe, source, student.device), section.temperature, vocab)

    if section.top_k is not None and section.top_k > len(tokenizer):
        raise ModelError(
            "train.distill.top_k", got=section.top_k, allowed=f"1 to {len(tokenizer)}, the tokens there are"
        )
    if section.top_k is None:
        return Distillation(section, load())
    marks = {
        "teacher": source.fingerprint(),
        "data": data_sha256,
        "settings": section.model_dump_json(exclude={"weight", "teacher", "revision"}),
    }
    return Distillation(section, CachedTeacher(run.teacher, load, section.top_k, marks, student.device))
