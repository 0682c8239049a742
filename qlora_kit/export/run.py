"""`qlora-kit export`: merge in fp32 on the dequantized base, write bundles, hold each to the trained model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.methods import method_for
from qlora_kit.data.dataset import prepare
from qlora_kit.data.template import stop_token_ids
from qlora_kit.errors import ExportError, RunError
from qlora_kit.export.bundle import make_bundle
from qlora_kit.export.calibration import linear_moments
from qlora_kit.export.codes import CODED_BASES, coded_layers
from qlora_kit.export.disk import needed_bytes, require_room
from qlora_kit.export.merge import LayerDelta, save_merged
from qlora_kit.export.onto import merge_onto
from qlora_kit.export.rows import calibration_rows, proof_rows, reference_rows
from qlora_kit.export.seq2seq_bundle import make_seq2seq_bundle, seq2seq_model
from qlora_kit.export.smoothing import input_ranges, smoothing_factors
from qlora_kit.export.task_bundle import TaskModel, make_task_bundle
from qlora_kit.export.task_proof import TaskDistances, bundled_task, context_length, task_rows
from qlora_kit.export.verify import PROFILES, Distances
from qlora_kit.model.load import to_reference
from qlora_kit.model.source import sha256_file
from qlora_kit.recipe import Onto, Recipe
from qlora_kit.train.records import tool_versions
from qlora_kit.train.restore import load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder, write_json

EXPORT_TOOLS = ("onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "qlora-runtime")

Found = Distances | TaskDistances


def export_run(
    run: RunFolder, console: Console, profiles: list[str] | None = None, onto: Onto | None = None
) -> dict[str, Found]:
    """Writes RUN/merged and RUN/bundles/PROFILE for each profile.

    Args:
        profiles, onto: instead of the recipe's export.profiles and export.onto.

    Raises:
        ExportError: an unknown profile, too few rows to prove a bundle on, a weight that is not finite, an
            architecture without a graph.
        VerificationError: a bundle is past its profile's tolerance (the others are still made).
    """
    recipe, tokenizer = run.recipe(), load_run_tokenizer(run)
    names, onto = profiles or list(recipe.export.profiles), onto or recipe.export.onto
    for name in names:
        if name not in PROFILES:
            raise ExportError("no such profile", got=name, allowed=", ".join(PROFILES))
        _require_fitting(name, recipe, onto)
    if reason := method_for(recipe.adapter).cannot_merge:
        raise ExportError(
            f"adapter.method {recipe.adapter.method} cannot be exported: {reason}",
            fix="Use RUN/adapter beside its base, or train with another method",
        )
    with run.lock():
        sources = _provenance(run)
        make = _merge(run, recipe, tokenizer, names, sources, onto, console)
        made: dict[str, Found] = {}
        failures: list[ExportError] = []
        for name in names:
            try:
                made[name] = make(name)
                console.print(_summary(run, name, made[name]), highlight=False)
            except ExportError as error:
                failures.append(error)
        shutil.rmtree(_scratch_folder(run), ignore_errors=True)
        if not recipe.export.merged and not failures:
            shutil.rmtree(run.merged)
    for other in failures[1:]:
        console.print(str(other), highlight=False)
    if failures:
        raise failures[0]
    return made


def _require_fitting(name: str, recipe: Recipe, onto: Onto) -> None:
    """Raises: ExportError where the run has not what the profile ships."""
    if name in CODED_BASES and onto != "dequantized":
        raise ExportError(f"{name} ships the codes that were trained on", got=f"onto {onto}", allowed="dequantized")
    if name in CODED_BASES and recipe.base.quant not in CODED_BASES[name]:
        raise ExportError(
            f"{name} ships the 4-bit codes that were trained on, and this base has none",
            got=f"base.quant={recipe.base.quant}",
            allowed=", ".join(CODED_BASES[name]),
            fix="Export another profile",
        )
    if name not in ("fp32", "int8") and recipe.task.type != "causal_lm":
        raise ExportError(
            f"{name} is for decoders that generate", got=recipe.task.type, allowed="fp32, int8", fix="Export int8"
        )


def _provenance(run: RunFolder) -> dict[str, Any]:
    """Base and adapter of a finished run, as its manifest records them.

    Raises:
        RunError: the run is not finished, or its adapter is not the one that it published.
    """
    manifest = run.manifest()
    weights = run.adapter / "adapter_model.safetensors"
    if "adapter" not in manifest or not weights.is_file():
        raise RunError(f"{run.path} is not finished", fix=f"Finish it: qlora-kit train --resume {run.path}")
    if sha256_file(weights) != manifest["adapter"]["sha256"]:
        raise RunError(f"{weights} was changed after training", fix="Put the file back, or train again")
    return {"base": manifest["base"], "adapter": manifest["adapter"]}


def _merge(
    run: RunFolder,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    sources: dict[str, Any],
    onto: Onto,
    console: Console,
) -> Callable[[str], Found]:
    """Writes RUN/merged and RUN/merge.json.

    Returns: what makes the bundle of a profile, and holds it to what the trained model said before it was merged; onto
    other weights than those it was trained on, to what the merged model says.

    Raises:
        ExportError: a task without bundles, too few rows to prove a bundle on, or a merged weight that is not finite.
    """
    task, model = run_task(run), to_reference(load_tuned(run))
    generates = task.settings.type == "causal_lm"
    translates = task.settings.type == "seq2seq"
    info = None if generates or translates else bundled_task(task, recipe.data, model)
    if generates:
        set_end_tokens(model, tokenizer)
    data = prepare(recipe.data, tokenizer, recipe.run.seed, task)
    chosen = proof_rows(data, recipe.export.verify_prompts)
    require_room(run, needed_bytes(model, names, chosen if generates else []), console)
    if onto != "dequantized":
        _save_merged(run, model, onto, tokenizer, console)
        sources["adapter"] |= {"merged_onto": onto}
        console.print(f"WARNING: merged onto the {onto} base, this is not quite the model that was trained")
    rows = reference_rows(model, tokenizer, chosen, _scratch_folder(run)) if generates else []
    text_model = seq2seq_model(model, task, chosen, recipe.data, tokenizer) if translates else None
    task_model = None
    if info is not None:
        answers = task_rows(model, task, info, chosen, recipe.data, tokenizer)
        task_model = TaskModel(info, task.auto_class, tokenizer, context_length(model), answers)
    coded = coded_layers(model) if CODED_BASES.keys() & set(names) else {}
    calibration = calibration_rows(data)
    ranges = input_ranges(model, calibration) if "int8" in names else {}
    moments = linear_moments(model, calibration) if "int4" in names else {}
    if onto == "dequantized":
        _save_merged(run, model, onto, tokenizer, console)
    smoothing = smoothing_factors(model, ranges)
    if layers := sum(name in smoothing for name, parameter in model.named_parameters() if parameter.ndim > 1):
        console.print(f"int8: ranges of {layers} layers moved from activations into weights", highlight=False)

    def make(name: str) -> Found:
        target, tools = run.bundles / name, tool_versions(EXPORT_TOOLS)
        about: dict[str, Any] = {"tools": tools, **sources}
        if text_model is not None:
            return make_seq2seq_bundle(run.merged, target, name, text_model, **about)
        about["factors"] = smoothing if name == "int8" else None
        if task_model is not None:
            return make_task_bundle(run.merged, target, name, task_model, **about)
        about["coded"] = coded if name in CODED_BASES else None
        return make_bundle(run.merged, target, PROFILES[name], rows, moments=moments, **about)

    return make


def _save_merged(
    run: RunFolder, model: PreTrainedModel, onto: Onto, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Merges `model` in place; its weights lie in RUN/merged from then on, not in memory."""
    deltas = save_merged(model, tokenizer, run.merged, lambda hold: merge_onto(run, model, onto, hold))
    write_json(run.path / "merge.json", _merge_report(deltas))
    console.print(f"merged {len(deltas)} layers in fp32 into {run.merged}", highlight=False)


def _scratch_folder(run: RunFolder) -> Path:
    """What the trained model said, whole; there only while exporting."""
    return run.path / ".partial-reference"


def set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The merged model stops where the tokenizer's template ends a turn, whoever runs it."""
    ends = stop_token_ids(tokenizer)
    single = ends[0] if len(ends) == 1 else ends
    model.config.eos_token_id = model.generation_config.eos_token_id = single
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def _merge_report(deltas: list[LayerDelta]) -> list[dict[str, float | str]]:
    return [
        {"layer": d.name, "delta_norm": d.delta_norm, "weight_norm": d.weight_norm, "ratio": d.ratio} for d in deltas
    ]


def _summary(run: RunFolder, name: str, found: Found) -> str:
    size = sum(file.stat().st_size for file in (run.bundles / name).rglob("*") if file.is_file())
    warnings = found.warnings if isinstance(found, Distances) else []
    return f"{run.bundles / name}: {size / 2**20:.0f} MiB, verified on {found.in_words()}" + "".join(
        f"\n{name}, WARNING: {warning}" for warning in warnings
    )
