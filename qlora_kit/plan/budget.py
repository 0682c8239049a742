"""The fastest recipe that fits into a budget: which options to change, and what each of them buys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from qlora_kit.errors import AdapterError, ModelError, TrainingError
from qlora_kit.plan.find_config import find_config
from qlora_kit.plan.headers import stored_dtype
from qlora_kit.plan.memory import Plan, plan
from qlora_kit.plan.show_bytes import format_bytes
from qlora_kit.plan.stored import Device
from qlora_kit.recipe import Recipe

EXPANDING_FLOPS = 200
"""What expanding a quantized weight costs, in operations of a matrix product: it is bound by memory, not arithmetic."""
TIGHT_COST = 1.1
"""Time of a step on a CPU whose allocator gives memory back at once, against one that keeps it."""
OFFLOAD_COST = 1.03
"""Time of a step whose inputs are copied to the host and back beside it; not yet measured on a GPU."""
HOST_ROWS_COST = 1.01
"""Time of a step that begins with rows of an embedding from the host; not yet measured on a GPU."""
_SMALLER = {"none": ("none", "int8", "nf4"), "int8": ("int8", "nf4")}
_LENGTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
_OPTIMIZERS = {"adamw": ("adamw", "paged_adamw_8bit"), "paged_adamw": ("paged_adamw", "paged_adamw_8bit")}


@dataclass(frozen=True)
class Choice:
    """A recipe that fits.

    Attributes:
        changes: (section.key, before, after, bytes that this one change saves).
    """

    recipe: Recipe
    plan: Plan
    changes: list[tuple[str, Any, Any, int]]
    time_against: float
    """Time of a token, against the recipe as it was."""

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={_yaml(after)}" for key, _, after, _ in self.changes]


def plan_recipe(recipe: Recipe, device: Device) -> Plan:
    """The plan of a recipe: config and headers are looked up where its base lies.

    Raises:
        ModelError, AdapterError: as `find_config` and `plan`.
    """
    config = find_config(recipe.base)
    return plan(recipe, config, device, stored_dtype(recipe.base, config))


def fitting(recipe: Recipe, budget: int, device: Device) -> Choice | None:
    """The fastest variant of a recipe that takes at most `budget` bytes; None where none does.

    Rows of a step stay. What costs nothing but time is changed first; then bits of the head, which hardly change the
    loss in int8 (benchmarks/head_quant.md); then bits of the base; then the length of rows.
    """
    config = find_config(recipe.base)
    stored = stored_dtype(recipe.base, config)

    def planned(candidate: Recipe) -> Plan:
        return plan(candidate, config, device, stored)

    quants, heads = _SMALLER.get(recipe.base.quant, (recipe.base.quant,)), _heads(recipe, config)
    places = _places(recipe, config, device)
    for length, quant, head in product(_LENGTHS, quants, heads):
        found = []
        start = _with(recipe, {"base.head_quant": head})
        for candidate in _same_result(start, length, quant, device, places):
            result = planned(candidate)
            if result.total_bytes <= budget:
                changed = len(list(_changed(recipe, candidate)))
                found.append((_time(candidate, result), changed, result.total_bytes, candidate, result))
        if found:
            time, _, _, best, result = min(found, key=lambda one: one[:3])
            changes = [
                (
                    key,
                    before,
                    after,
                    planned(_with(best, {key: before, **_rows(recipe, key)})).total_bytes - result.total_bytes,
                )
                for key, before, after in _changed(recipe, best)
            ]
            return Choice(best, result, changes, time / _time(recipe, planned(recipe)))
    return None


def _heads(recipe: Recipe, config: dict[str, Any]) -> tuple[str, ...]:
    """How the head may be stored: as the recipe has it, and where it is frozen and not yet codes, in int8."""
    if "quantization_config" in config or recipe.task.type != "causal_lm":
        return (recipe.base.head_quant,)
    return _allowed(recipe, config, "head_quant", plain="none", other="int8")


def _places(recipe: Recipe, config: dict[str, Any], device: Device) -> tuple[str, ...]:
    """Where the embedding may be: as the recipe has it, and on the host where that is another memory and allowed."""
    if device == "cpu":
        return (recipe.base.embeddings,)
    return _allowed(recipe, config, "embeddings", plain="device", other="host")


def _allowed(recipe: Recipe, config: dict[str, Any], field: str, plain: str, other: str) -> tuple[str, ...]:
    """What base.FIELD may be: as the recipe has it, and `other` where that is `plain` and a plan takes the other."""
    kept = getattr(recipe.base, field)
    if kept != plain:
        return (kept,)
    try:
        plan(_with(recipe, {f"base.{field}": other}), config)
    except (AdapterError, ModelError):
        return (kept,)
    return kept, other


def must_fit(recipe: Recipe, budget: int, device: Device) -> Choice:
    """As `fitting`.

    Raises:
        TrainingError: nothing does.
    """
    found = fitting(recipe, budget, device)
    if found is None:
        least = _with(recipe, {"train.micro_batch_size": 1, "train.gradient_checkpointing": True})
        needed = plan_recipe(least, device).exact_bytes
        raise TrainingError(
            f"no variant of this recipe fits into {format_bytes(budget)}: {format_bytes(needed)} are stored throughout",
            fix="Take a smaller base, a lower adapter.rank or fewer adapter.target_modules",
        )
    return found


def _same_result(
    recipe: Recipe, length: float, quant: str, device: Device, places: tuple[str, ...]
) -> Iterator[Recipe]:
    """Variants that train on the same rows a step."""
    train = recipe.train
    rows = train.micro_batch_size * train.grad_accum_steps
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    optimizers = _OPTIMIZERS.get(train.optimizer, (train.optimizer,)) if device == "cuda" else (train.optimizer,)
    allocators = ("fast", "tight") if device == "cpu" else (train.allocator,)
    scored = {recipe.eval.batch_size, 1}
    again_by = (False, True, "offload") if device == "cuda" else (False, recipe.train.gradient_checkpointing or True)
    choices = product(sizes, again_by, optimizers, allocators, scored, places)
    for size, again, optimizer, allocator, at_once, place in choices:
        yield _with(
            recipe,
            {
                "train.micro_batch_size": size,
                "train.grad_accum_steps": rows // size,
                "train.gradient_checkpointing": again,
                "train.optimizer": optimizer,
                "train.allocator": allocator,
                "eval.batch_size": at_once,
                "base.quant": quant,
                "base.embeddings": place,
                "data.max_seq_len": max(8, int(recipe.data.max_seq_len * length)),
            },
        )


def _time(recipe: Recipe, result: Plan) -> float:
    """Of a token, in operations: arithmetic, and the expansion of every weight once in each pass of a micro batch."""
    tokens = recipe.train.micro_batch_size * recipe.data.max_seq_len
    passes = 3 if recipe.train.gradient_checkpointing else 2
    expanded = 0.0 if recipe.base.quant == "none" else EXPANDING_FLOPS * passes * result.base_parameters / tokens
    slower = TIGHT_COST if recipe.train.allocator == "tight" and result.device == "cpu" else 1.0
    if recipe.train.gradient_checkpointing == "offload" and result.device == "cuda":
        slower *= OFFLOAD_COST
    if recipe.base.embeddings == "host" and result.device == "cuda":
        slower *= HOST_ROWS_COST
    return (result.flops_per_token + expanded) * slower


def _with(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values of `section.key`; all of them are of the right type."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    made = {name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()}
    return recipe.model_copy(update=made)


def _rows(recipe: Recipe, key: str) -> dict[str, Any]:
    """Micro batch and accumulation belong together."""
    if key not in ("train.micro_batch_size", "train.grad_accum_steps"):
        return {}
    return {f"train.{name}": getattr(recipe.train, name) for name in ("micro_batch_size", "grad_accum_steps")}


def _changed(before: Recipe, after: Recipe) -> Iterator[tuple[str, Any, Any]]:
    for section in ("base", "data", "train", "eval"):
        old, new = (getattr(recipe, section).model_dump() for recipe in (before, after))
        yield from ((f"{section}.{key}", old[key], new[key]) for key in old if old[key] != new[key])


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
