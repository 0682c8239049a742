"""`qlora-kit export RUN --adapters RUN ...`: one base with several adapters beside it, each held to its own model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_runtime import Bundle, Provenance, Reference, Verification, write_manifest, write_reference
from qlora_runtime.schema import ADAPTER_FILE, ADAPTERS
from rich.console import Console
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.layer import SideBranch
from qlora_kit.adapters.switch import AdapterSet
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import ExportError
from qlora_kit.export.bundle import model_info, published, text_hashes
from qlora_kit.export.codes import CodedLayer, coded_layers, same_codes
from qlora_kit.export.disk import needed_bytes, require_room
from qlora_kit.export.graph import GRAPH, build_graph
from qlora_kit.export.merge import merge_adapter, save_merged
from qlora_kit.export.reference import ReferenceRow
from qlora_kit.export.rows import proof_rows, reference_rows
from qlora_kit.export.run import set_end_tokens
from qlora_kit.export.swapped import Adapted, Places, open_inputs, side_branches, swapped_forms, write_adapter_file
from qlora_kit.export.verify import PROFILES, Distances, measure, tolerance_of
from qlora_kit.model.load import to_reference
from qlora_kit.model.source import sha256_file
from qlora_kit.train.restore import load_run_base, load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

PROFILE, ALONE = "adapters", "no adapter"


@dataclass(frozen=True)
class Swap:
    """An adapter to ship: where it lies, what it adds, and what its model said."""

    folder: Path
    branches: dict[str, SideBranch]
    rows: list[ReferenceRow]


def export_swapped(run: RunFolder, folders: dict[str, Path], tools: dict[str, str], console: Console) -> None:
    """Writes RUN/bundles/adapters: the run's base with adapters beside it, none in use by default.

    The base is in the codes that it was trained in where these are of 4 bit, else in fp32; nothing is rounded.

    Args:
        folders: of the adapters, by name.

    Raises:
        AdapterError: an adapter does not fit the base, or cannot stand beside others.
        ExportError: an adapter of layers that are not linear, or a task that does not generate.
        VerificationError: with one of the adapters, or without, the bundle is past its tolerance.
    """
    recipe, tokenizer, scratch = run.recipe(), load_run_tokenizer(run), run.path / ".partial-swapped"
    if recipe.task.type != "causal_lm":
        raise ExportError("adapters are swapped in decoders that generate", got=recipe.task.type, allowed="causal_lm")
    with run.lock():
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            model = to_reference(load_run_base(run).eval())
            set_end_tokens(model, tokenizer)
            chosen = proof_rows(prepare(recipe.data, tokenizer, recipe.run.seed), recipe.export.verify_prompts)
            said = chosen * (len(folders) + 1)
            require_room(run, needed_bytes(model, ["fp32"], said), console)
            swaps = _swaps(model, folders, lambda name: reference_rows(model, tokenizer, chosen, scratch / name))
            base_rows = reference_rows(model, tokenizer, chosen, scratch / "base")
            coded, merged = coded_layers(model), scratch / "merged"
            save_merged(model, tokenizer, merged, lambda hold: merge_adapter(model, hold))

            def build(folder: Path) -> tuple[dict[str, Distances], list[str]]:
                places: Places = {}
                build_graph(merged, folder, swapped_forms(coded, _adapted(swaps), places))
                open_inputs(folder / GRAPH, places)
                for name, swap in swaps.items():
                    write_adapter_file(folder / ADAPTERS / name / ADAPTER_FILE, swap.branches, places)
                about = {
                    "profile": PROFILE,
                    "model": model_info(folder),
                    "provenance": Provenance(run.manifest()["base"], None, *text_hashes(merged)),
                    "tools": tools,
                }
                return _prove(folder, base_rows, swaps, coded, about)

            for name, found in published(run.bundles / PROFILE, PROFILE, build).items():
                console.print(f"{run.bundles / PROFILE}, {name}: verified on {found.in_words()}", highlight=False)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _swaps(model: PreTrainedModel, folders: dict[str, Path], ask: Any) -> dict[str, Swap]:
    adapters, found = AdapterSet(model), {}
    for name, folder in folders.items():
        adapters.load(name, folder)
        adapters.use(name)
        found[name] = Swap(folder, side_branches(name, dict(adapted_layers(model))), ask(name))
    adapters.use(None)
    return found


def _adapted(swaps: dict[str, Swap]) -> dict[str, Adapted]:
    found: dict[str, Adapted] = {}
    for swap in swaps.values():
        for layer, branch in swap.branches.items():
            rank, scaled = found.get(layer, (0, False))
            found[layer] = Adapted(max(rank, len(branch.a)), scaled or branch.row_scale is not None)
    return found


def _prove(
    folder: Path,
    base_rows: list[ReferenceRow],
    swaps: dict[str, Swap],
    coded: dict[str, CodedLayer],
    about: dict[str, Any],
) -> tuple[dict[str, Distances], list[str]]:
    """Writes references and manifest, and measures the base alone and with each adapter."""
    profile = PROFILES["nf4" if coded else "fp32"]
    write_reference(folder, Reference([row.shipped() for row in base_rows], profile.reference))
    for name, swap in swaps.items():
        reference = Reference([row.shipped() for row in swap.rows], profile.reference)
        write_reference(folder / ADAPTERS / name, reference)
    write_manifest(folder, verification=None, **about)
    bundle = Bundle.open(folder)
    alone, reasons = measure(bundle, base_rows, profile)
    if coded:
        alone = replace(alone, identical_codes=same_codes(folder / GRAPH, coded))
        if alone.identical_codes is None:
            reasons.append("its codes are not the training base's.")
    found = {ALONE: alone}
    for name, swap in swaps.items():
        found[name], past = measure(bundle.with_adapter(name), swap.rows, profile)
        reasons += [f"{name}: {reason}" for reason in past]
    distances = alone.to_json() | {
        "adapters": {
            name: {**found[name].to_json(), "sha256": sha256_file(swap.folder / "adapter_model.safetensors")}
            for name, swap in swaps.items()
        }
    }
    write_manifest(folder, verification=Verification(not reasons, tolerance_of(profile), distances), **about)
    return found, reasons
