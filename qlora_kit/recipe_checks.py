"""Which fields of a recipe do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe


def disagreements(recipe: Recipe) -> list[str]:
    """One line for each; none where the recipe can be run."""
    return [*_length_problems(recipe), *_choice_problems(recipe), *_task_problems(recipe)]


def _length_problems(recipe: Recipe) -> list[str]:
    train, data, problems = recipe.train, recipe.data, []
    if (train.max_steps is None) == (train.epochs is None):
        problems.append("train: give exactly one of max_steps and epochs")
    if data.streaming and (train.max_steps is None or data.eval is None):
        problems.append("data.streaming needs train.max_steps and data.eval: a stream has no known length to split")
    if train.max_steps is not None and train.warmup_steps > train.max_steps:
        fix = f"set train.warmup_steps to {train.max_steps} at most"
        problems.append(f"train.warmup_steps {train.warmup_steps} is more than max_steps {train.max_steps}: {fix}")
    if train.distill and recipe.adapter.new_tokens:
        problems.append("train.distill cannot be had with adapter.new_tokens: the teacher does not know them")
    if train.distill and train.distill.top_k and data.streaming:
        problems.append("train.distill.top_k needs rows that are read first: leave it out, or data.streaming")
    if recipe.adapter.trains_all and recipe.base.quant != "none":
        got = f"got {recipe.base.quant}; codes cannot be trained"
        problems.append(f"adapter.method {recipe.adapter.method} needs base.quant: none ({got})")
    problems += _int4_problems(recipe) + _frozen_problems(recipe)
    if _calibrates(recipe) and data.streaming:
        problems.append("adapter.calibration_rows needs rows that are read first: leave it out, or data.streaming")
    if train.early_stopping_patience and not train.eval_every:
        problems.append("train.early_stopping_patience needs train.eval_every")
    return problems


def _frozen_problems(recipe: Recipe) -> list[str]:
    """What a head that is held as codes, and an embedding on the host, cannot have: they are frozen."""
    problems, adapter = [], recipe.adapter
    frozen = {"base.head_quant": ("head", recipe.base.head_quant != "none")}
    frozen["base.embeddings: host"] = ("embedding", recipe.base.embeddings == "host")
    if frozen["base.head_quant"][1] and recipe.task.type != "causal_lm":
        problems.append(f"base.head_quant needs task.type: causal_lm (got {recipe.task.type})")
    for field, part in ((field, part) for field, (part, chosen) in frozen.items() if chosen):
        if adapter.new_tokens:
            problems.append(f"{field} cannot be had with adapter.new_tokens, which train the {part}")
        if adapter.trains_all:
            problems.append(f"{field} cannot be had with adapter.method {adapter.method}, which trains the {part}")
    return problems


def _int4_problems(recipe: Recipe) -> list[str]:
    """Choices that only an int4 base has."""
    base, fields = recipe.base, type(recipe.base).model_fields
    chosen = [name for name in ("block_size", "int4_algorithm") if getattr(base, name) != fields[name].default]
    problems = [f"base.{name} needs base.quant: int4 (got {base.quant})" for name in chosen if base.quant != "int4"]
    if recipe.adapter.method == "qa_lora":
        size = recipe.adapter.group_size
        if base.quant != "int4":
            got = f"got {base.quant}; elsewhere no blocks could take its delta"
            problems.append(f"adapter.method qa_lora needs base.quant: int4 ({got})")
        elif size % base.block_size:
            allowed = f"must be a multiple of base.block_size {base.block_size}: its delta is constant within blocks"
            problems.append(f"adapter.group_size {size} {allowed}")
    return problems


def _calibrates(recipe: Recipe) -> bool:
    return recipe.adapter.method == "loftq" and recipe.adapter.calibration_rows > 0


def _task_problems(recipe: Recipe) -> list[str]:
    """What only causal language modelling has."""
    if recipe.task.type == "causal_lm":
        return []
    data, adapter = recipe.data, recipe.adapter
    wrong = {
        "data.streaming": data.streaming,
        "data.chat_template": data.chat_template,
        "data.system_prompt": data.system_prompt,
        "data.schema": data.schema_ or any(source.schema_ for source in data.sources()),
        "data.train_on: all": data.train_on == "all",
        "train.distill": recipe.train.distill,
        "eval.answer": recipe.eval.answer != "none",
        "adapter.new_tokens": adapter.new_tokens,
        "adapter.calibration_rows": _calibrates(recipe),
        "adapter.method: prompt_tuning": adapter.method == "prompt_tuning",
    }
    return [f"{field} needs task.type: causal_lm (got {recipe.task.type})" for field, got in wrong.items() if got]


def _choice_problems(recipe: Recipe) -> list[str]:
    section = recipe.eval
    problems, choices = [], section.choices
    if choices and section.answer != "choices":
        problems.append(f"eval.choices needs eval.answer: choices (got {section.answer!r})")
    if choices and len(set(choices)) < max(2, len(choices)):
        problems.append(f"eval.choices: got {choices!r}; give at least two, each once")
    return problems
