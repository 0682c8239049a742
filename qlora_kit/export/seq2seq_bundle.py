"""Makes a bundle of an encoder-decoder: two graphs, tokenizer, reference answers, and a manifest with the proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qlora_runtime import ModelInfo, Provenance, Reference, Seq2SeqBundle, Verification, write_manifest, write_reference
from qlora_runtime.encoder import TokenRow
from qlora_runtime.task import Seq2SeqTask
from qlora_runtime.texts import TextEncoder
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.errors import ExportError
from qlora_kit.export.bundle import published
from qlora_kit.export.reference import GREEDY_TOKENS, Origin, ReferenceRow
from qlora_kit.export.rows import ProofRow
from qlora_kit.export.seq2seq_graph import build_seq2seq_graphs
from qlora_kit.export.task_proof import EXACT_LOGIT, check_same_tokens, context_length, examples_at
from qlora_kit.export.verify import PROFILES, Distances, Profile, measure, tolerance_of
from qlora_kit.model.quantized import expanded
from qlora_kit.model.source import sha256_file
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import Seq2SeqSettings
from qlora_kit.tasks.task import Task


@dataclass(frozen=True)
class Seq2SeqModel:
    """What a bundle is made of.

    Attributes:
        context_length: the most tokens that the decoder can read.
        rows: the trained model's answers to the rows of the proof.
    """

    task: Seq2SeqTask
    end_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    rows: list[ReferenceRow]


def seq2seq_model(
    model: PreTrainedModel,
    task: Task[Seq2SeqSettings],
    chosen: Sequence[ProofRow],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
) -> Seq2SeqModel:
    """The trained model's own answers on the rows on which bundles are proven, read as the runtime reads them.

    Raises:
        ExportError: the runtime would make other tokens of a row, or begin its answer with another token, than
            training did.
    """
    length = context_length(model)
    ends = _said(model, "eos_token_id")
    info = Seq2SeqTask(
        task.settings.source_prefix,
        min(section.max_seq_len, length),
        _said(model, "decoder_start_token_id"),
        _said(model, "forced_bos_token_id"),
    )
    texts = TextEncoder(tokenizer.backend_tokenizer, info.max_seq_len)  # type: ignore[attr-defined]
    for place, example in examples_at(task, section, {(row.source, row.row) for row, _ in chosen}):
        rows: list[TokenRow] = [texts.encode(info.source_prefix + example.source)]
        check_same_tokens(place, rows, chosen)
    with expanded(model, model.dtype):
        rows_answered = [
            answer(model, info, row.input_ids, row.labels, "held_out" if origin == "held_out" else "training")
            for row, origin in chosen  # nothing is calibrated
        ]
    end_ids = tuple(ends) if isinstance(ends, list) else (ends,)
    return Seq2SeqModel(info, end_ids, tokenizer.pad_token_id, length, rows_answered)


def make_seq2seq_bundle(
    merged: Path, target: Path, profile: str, model: Seq2SeqModel, base: Any, adapter: Any, tools: Any
) -> Distances:
    """Builds and verifies a bundle of the merged model; arguments and errors as for `make_bundle`."""
    limits = profile_for(PROFILES[profile], model.rows)

    def build(folder: Path) -> tuple[Distances, list[str]]:
        build_seq2seq_graphs(merged, folder, profile)
        write_reference(folder, Reference([row.shipped() for row in model.rows], limits.reference))
        about: dict[str, Any] = {
            "profile": profile,
            "model": _model_info(folder, model),
            "provenance": Provenance(base, adapter, sha256_file(merged / "tokenizer.json"), None),
            "tools": tools,
            "task": model.task,
        }
        write_manifest(folder, verification=None, **about)
        found, reasons = measure(Seq2SeqBundle.open(folder), model.rows, limits)
        verification = Verification(not reasons, tolerance_of(limits), found.to_json())
        write_manifest(folder, verification=verification, **about)
        return found, reasons

    return published(target, profile, build)


def profile_for(profile: Profile, rows: Sequence[ReferenceRow]) -> Profile:
    """The profile, with what an exact logit may differ by in the unit of this model's logits."""
    if not profile.exact:
        return profile
    limit = EXACT_LOGIT * max(1.0, *(float(np.abs(row.logits).max()) for row in rows))
    return replace(profile, reference=replace(profile.reference, max_logit=limit, greedy_margin=4 * limit))


@torch.no_grad()
def answer(
    model: PreTrainedModel, info: Seq2SeqTask, source_ids: np.ndarray, labels: np.ndarray, origin: Origin
) -> ReferenceRow:
    """Runs the reference model on one row: the logits of its target, then a greedy answer.

    Raises:
        ExportError: the decoder's first token is another in training than where it generates.
    """
    run: Any = model
    source, target = (torch.tensor(ids[None], device=model.device).long() for ids in (source_ids, labels))
    read = run.prepare_decoder_input_ids_from_labels(labels=target)  # [1, target]
    if int(read[0, 0]) != info.decoder_start_token_id:
        raise ExportError(
            f"{type(model).__name__} begins targets with another token than answers",
            got=int(read[0, 0]),
            allowed=f"its decoder_start_token_id {info.decoder_start_token_id}",
            fix="Use RUN/adapter beside its base",
        )
    mask = torch.ones_like(source)
    logits = run(input_ids=source, attention_mask=mask, decoder_input_ids=read, use_cache=False).logits
    greedy_ids, margins = _greedy(run, info, source, mask)
    return ReferenceRow(
        [info.decoder_start_token_id, *target[0].tolist()],
        target.shape[1],
        list(range(target.shape[1])),
        logits[0].float().cpu().numpy(),
        greedy_ids,
        margins,
        origin,
        source[0].tolist(),
    )


def _greedy(model: Any, info: Seq2SeqTask, source: Tensor, mask: Tensor) -> tuple[list[int], list[float]]:
    """Greedy tokens up to and with the first end token, and top-1 minus top-2 before each; 0 of one that is forced."""
    found, ends = _said(model, "eos_token_id"), set[int]()
    ends |= set(found if isinstance(found, list) else [found])
    encoded, cache = model.get_encoder()(input_ids=source, attention_mask=mask), None
    unread, tokens, margins = [info.decoder_start_token_id], list[int](), list[float]()
    if info.forced_bos_token_id is not None:
        unread.append(info.forced_bos_token_id)
        tokens, margins = [info.forced_bos_token_id], [0.0]
    while len(tokens) < min(GREEDY_TOKENS, context_length(model) - 1):
        output = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=torch.tensor([unread], device=source.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache, best = output.past_key_values, output.logits[0, -1].float().topk(2)
        unread = [int(best.indices[0])]
        tokens += unread
        margins.append(float(best.values[0] - best.values[1]))
        if tokens[-1] in ends:
            break
    return tokens, margins


def _said(model: Any, name: str) -> Any:
    """What the model is told to generate with; its configuration speaks where that says nothing."""
    found = getattr(model.generation_config, name, None)
    return getattr(model.config, name, None) if found is None else found


def _model_info(folder: Path, model: Seq2SeqModel) -> ModelInfo:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelInfo(
        config["architectures"][0], config["vocab_size"], model.context_length, model.end_ids, model.pad_id
    )
