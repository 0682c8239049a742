"""Makes a bundle: graph, weights, tokenizer, reference answers, and a manifest with the proof in it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_runtime import Bundle, ModelInfo, Provenance, Reference, Verification, write_manifest, write_reference

from qlora_kit.errors import VerificationError
from qlora_kit.export.graph import build_graph
from qlora_kit.export.reference import ReferenceRow
from qlora_kit.export.verify import Distances, Profile, measure, tolerance_of
from qlora_kit.model.source import sha256_file


def make_bundle(
    merged: Path, target: Path, profile: Profile, rows: list[ReferenceRow], base: Any, adapter: Any, tools: Any
) -> Distances:
    """Builds and verifies a bundle of the merged model; it appears at `target` only if it passed.

    Args:
        rows: the reference's answers to held-out rows.
        base, adapter: what the model was made from, for the manifest.

    Raises:
        VerificationError: the bundle is past its tolerance; it is left at TARGET.rejected, to be looked at.
    """
    partial = target.with_name(f".partial-{target.name}")
    rejected = target.with_name(f"{target.name}.rejected")
    for folder in (partial, rejected):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build_graph(merged, partial, profile.name)
        write_reference(partial, Reference([row.shipped() for row in rows], profile.reference))
        about = {
            "profile": profile.name,
            "model": _model_info(partial),
            "provenance": Provenance(base, adapter, *_text_hashes(merged)),
            "tools": tools,
        }
        write_manifest(partial, verification=None, **about)
        distances, reasons = measure(Bundle.open(partial), rows, profile)
        proof = Verification(not reasons, tolerance_of(profile), asdict(distances))
        write_manifest(partial, verification=proof, **about)
        final = rejected if reasons else target
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if reasons:
        raise VerificationError(
            f"{profile.name}: the bundle is not the model that was trained: {' '.join(reasons)}",
            fix=f"It lies in {rejected} to be looked at; export another profile, or report this",
        )
    return distances


def _model_info(folder: Path) -> ModelInfo:
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


def _text_hashes(merged: Path) -> tuple[str, str | None]:
    template = merged / "chat_template.jinja"
    return sha256_file(merged / "tokenizer.json"), sha256_file(template) if template.exists() else None
