"""Makes a bundle: graph, weights, tokenizer, reference answers, and a manifest with the proof in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from qlora_runtime import (
    Bundle,
    BundleError,
    ModelInfo,
    Provenance,
    Reference,
    Verification,
    write_manifest,
    write_reference,
)
from torch import Tensor

from qlora_kit.errors import ExportError, VerificationError
from qlora_kit.export.codes import CodedLayer, same_codes
from qlora_kit.export.forms import forms_of
from qlora_kit.export.graph import GRAPH, UnknownToBuilder, build_graph
from qlora_kit.export.parameters import Factors
from qlora_kit.export.reference import ReferenceRow
from qlora_kit.export.traced_graph import build_traced_graph
from qlora_kit.export.verify import Distances, Profile, measure, tolerance_of
from qlora_kit.model.source import sha256_file

T = TypeVar("T")

REJECTED = ".rejected"
"""Ending of a bundle's folder that did not pass."""


def make_bundle(
    merged: Path,
    target: Path,
    profile: Profile,
    rows: list[ReferenceRow],
    base: Any,
    adapter: Any,
    tools: Any,
    coded: Mapping[str, CodedLayer] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    factors: Factors | None = None,
) -> Distances:
    """Builds and verifies a bundle of the merged model; it appears at `target` only if it passed.

    Args:
        rows: the reference's answers to the rows of the proof.
        base, adapter: what the model was made from, for the manifest.
        coded: the training base's 4-bit layers, for a profile that ships their codes.
        moments: second moments of the inputs of layers, by name, for a profile that rounds by them.
        factors: what makes the merged weights easier to round, multiplied as they are read.

    Raises:
        VerificationError: the bundle is past its tolerance; it is left at TARGET.rejected, to be looked at, and
            nothing at `target`.
        ExportError: the model has no graph, the graph does not run, or the disk is full; `target` is untouched.
    """

    def build(folder: Path) -> tuple[Distances, list[str]]:
        try:
            build_graph(merged, folder, forms_of(profile.name, coded or {}, moments or {}), factors)
        except UnknownToBuilder:
            build_traced_graph(merged, folder, profile.name, factors)
        return _prove(merged, folder, profile, rows, {"tools": tools}, base, adapter, coded)

    return published(target, profile.name, build)


def published(target: Path, profile: str, build: Callable[[Path], tuple[T, list[str]]]) -> T:
    """What `build` found of the bundle that it made in a folder: its distances, and reasons why it did not pass.

    Raises: as `make_bundle`.
    """
    partial = target.with_name(f".partial-{target.name}")
    rejected = target.with_name(f"{target.name}{REJECTED}")
    try:
        for folder in (partial, rejected):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        found, reasons = build(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, rejected if reasons else target)
    except BundleError as error:
        raise ExportError(f"{profile}: the bundle does not run: {error}", fix="Report this") from error
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror}", fix="Free some space and export again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if reasons:
        raise VerificationError(
            f"{profile}: the bundle is not the model that was trained: {' '.join(reasons)}",
            fix=f"It lies in {rejected} to be looked at; export another profile, or report this",
        )
    return found


def _prove(
    merged: Path,
    bundle: Path,
    profile: Profile,
    rows: list[ReferenceRow],
    about: dict[str, Any],
    base: Any,
    adapter: Any,
    coded: Mapping[str, CodedLayer] | None,
) -> tuple[Distances, list[str]]:
    """Adds reference and manifest to a graph, measures, and writes the manifest again with what was found."""
    write_reference(bundle, Reference([row.shipped() for row in rows], profile.reference))
    about |= {
        "profile": profile.name,
        "model": model_info(bundle),
        "provenance": Provenance(base, adapter, *text_hashes(merged)),
    }
    write_manifest(bundle, verification=None, **about)
    distances, reasons = measure(Bundle.open(bundle), rows, profile)
    if coded is not None:
        distances = replace(distances, identical_codes=same_codes(bundle / GRAPH, coded))
        if distances.identical_codes is None:
            reasons.append("its codes are not the training base's.")
    found = Verification(not reasons, tolerance_of(profile), distances.to_json())
    write_manifest(bundle, verification=found, **about)
    return distances, reasons


def model_info(folder: Path) -> ModelInfo:
    """What the manifest says of the model whose graph lies in `folder`."""
    genai = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    eos = genai["eos_token_id"]
    return ModelInfo(
        architecture=config["architectures"][0],
        vocab_size=genai["vocab_size"],
        context_length=genai["context_length"],
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos]),
        pad_token_id=genai.get("pad_token_id"),
    )


def text_hashes(merged: Path) -> tuple[str, str | None]:
    """sha256 of tokenizer and, where there is one, chat template."""
    template = merged / "chat_template.jinja"
    return sha256_file(merged / "tokenizer.json"), sha256_file(template) if template.exists() else None
