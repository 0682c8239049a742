"""Training and held-out rows of a recipe, encoded, split, mixed and accounted for."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_kit.data.encoded_rows import EncodedRows
from qlora_kit.data.examples import content_hash, split_key
from qlora_kit.data.kinds import LANGUAGE, RowKind
from qlora_kit.data.masking import Encoded
from qlora_kit.data.mixing import draw_counts, draw_rows
from qlora_kit.data.reading import SourceEncoder, eval_source
from qlora_kit.data.report import EXAMPLES_SHOWN, DataReport
from qlora_kit.data.task_labels import LabelCounts, strata, stratified_mask
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on, evaluates on, and says about its data."""

    train: EncodedRows
    """Rows of one epoch; empty where `data.streaming` reads them as training goes."""
    eval: EncodedRows
    report: DataReport

    @property
    def sha256(self) -> str:
        """Hex digest of all sources and the template: what a resumed run must find again."""
        parts = [self.report.fingerprints(), self.report.template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def changed_since(self, manifest_data: dict[str, Any]) -> list[str]:
        """Paths of the sources that are not as a run's manifest names them (its `data`): changed, new or gone."""
        sources = [*manifest_data.get("train", []), manifest_data.get("eval")]
        before = {source["path"]: source["fingerprint"] for source in sources if source}
        now = self.report.fingerprints()
        return [path for path in {**now, **before} if now.get(path) != before.get(path)]

    def describe_row(self, row: Encoded) -> str:
        """`FILE row N`."""
        return f"{self.report.path_of(row.source)} row {row.row}"


def prepare(section: DataSection, tokenizer: Any, seed: int, kind: RowKind = LANGUAGE) -> PreparedData:
    """Reads, encodes, splits and mixes all rows of a recipe; the tokenizer's template is the resolved one.

    Held-out rows: those of `data.eval`, or the training rows whose seeded hash of everything before the last
    assistant turn falls below `data.eval_fraction`. Equal rows, and rows with an equal prompt, thus land on
    one side, and a row stays on its side when others are added. If none falls below, the prompt with the
    lowest hash is held out. Of rows with labels each label's rows are split so (see `stratified_mask`).

    Mixing: see `mixing.draw_counts`; without weights every training row is in the epoch once.

    `kind` says how rows are read and encoded; language modelling's where it is left out.

    With `data.streaming` only the eval file is read; `StreamedTrain` reads the rest.

    Raises:
        DataError: a source or row cannot be used (see `data.bad_rows`), or no row is left.
    """
    encoders = [SourceEncoder(k, source, section, tokenizer, kind=kind) for k, source in enumerate(section.sources())]
    report = DataReport([encoder.report for encoder in encoders], template=getattr(tokenizer, "chat_template", None))
    if section.streaming:
        return PreparedData(EncodedRows().seal(), prepare_eval(section, tokenizer, report, kind), report)
    rows, keys, examples = _read_all(encoders, seed, kind)
    report.doubtful_labels = _doubtful(rows, examples, report)
    held_out = EncodedRows(kind.own_labels)
    if section.eval is None:
        if kind.has_labels:
            on_eval_side = stratified_mask(keys, strata(examples), section.eval_fraction)
        else:
            on_eval_side = held_out_mask(keys, section.eval_fraction)
        held_out = rows.take(np.flatnonzero(on_eval_side))
        rows = rows.take(np.flatnonzero(~on_eval_side))
    else:
        held_out = prepare_eval(section, tokenizer, report, kind)
    _count(rows, held_out, encoders, section)
    _report_overlap(rows, held_out, report)
    train = rows.take(draw_rows(rows.sources(), draw_counts(section.sources(), rows.sources()), seed))
    for encoder in encoders:
        encoder.report.drawn = int((train.sources() == encoder.index).sum())
    report.eval_rows = len(held_out)
    return PreparedData(train, held_out, report)


def prepare_eval(section: DataSection, tokenizer: Any, report: DataReport, kind: RowKind = LANGUAGE) -> EncodedRows:
    """The rows of `data.eval`; their counts go to `report.eval`. Their source index is that of the file after
    the training sources.

    Raises:
        DataError: a row cannot be used, or none is left.
    """
    source = eval_source(section)
    if source is None:
        raise DataError("data.eval is not set", fix="Name a file with held-out rows")
    plain = section.model_copy(update={"streaming": False})
    encoder = SourceEncoder(len(section.sources()), source, plain, tokenizer, kind=kind)
    report.eval = encoder.report
    rows = EncodedRows(kind.own_labels)
    for row, example in encoder.rows():
        rows.append(row, content_hash(example))
        encoder.report.use(row)
    _require_rows(len(rows.seal()), [encoder])
    report.eval_rows = len(rows)
    return rows


def held_out_mask(keys: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: which rows are held out, by their split keys (uint64 [rows]).

    Raises:
        DataError: there are fewer than two different keys, so that nothing could be held out.
    """
    mask = keys < np.uint64(int(fraction * 2**64))
    if mask.any() and not mask.all():
        return mask
    if len(np.unique(keys)) < 2:
        raise DataError(
            f"{len(keys)} usable rows with one prompt between them: none can be held out",
            fix="Add rows, or set data.eval",
        )
    return keys == keys.min()


def _read_all(encoders: list[SourceEncoder], seed: int, kind: RowKind) -> tuple[EncodedRows, np.ndarray, list[Any]]:
    """(all rows, their split keys uint64 [rows], their examples where these have labels to split by)."""
    rows, keys, examples = EncodedRows(kind.own_labels), array("Q"), []
    for encoder in encoders:
        for row, example in encoder.rows():
            rows.append(row, content_hash(example))
            keys.append(split_key(example, seed))
            if kind.has_labels:
                examples.append(example)
    _require_rows(len(rows.seal()), encoders)
    return rows, np.array(keys, dtype=np.uint64), examples


def _doubtful(rows: EncodedRows, examples: list[Any], report: DataReport) -> list[str]:
    """What may be wrong with the labels of the rows' `examples`, which are none where rows have no labels."""
    counts = LabelCounts()
    for row, example in zip(rows, examples):
        counts.add(example, f"{report.path_of(row.source)} row {row.row}")
    return counts.doubts()


def _require_rows(usable: int, encoders: list[SourceEncoder]) -> None:
    if usable:
        return
    paths = ", ".join(encoder.source.path for encoder in encoders)
    reasons: dict[str, int] = {}
    first = ""
    for encoder in encoders:
        for reason, count in encoder.report.skipped.items():
            reasons[reason] = reasons.get(reason, 0) + count
            first = first or encoder.report.skipped_examples[reason][0]
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    raise DataError(f"no usable row in {paths} (skipped: {counts}). The first: {first}")


def _count(train: EncodedRows, held_out: EncodedRows, encoders: list[SourceEncoder], section: DataSection) -> None:
    for row in train:
        encoders[row.source].report.use(row)
    if section.eval is None:
        for source in held_out.sources():
            encoders[source].report.held_out += 1


def _report_overlap(train: EncodedRows, held_out: EncodedRows, report: DataReport) -> None:
    shared = np.flatnonzero(np.isin(held_out.contents(), train.contents()))
    report.overlap = len(shared)
    for position in shared[:EXAMPLES_SHOWN]:
        row = held_out[position]
        report.overlap_examples.append(f"{report.path_of(row.source)} row {row.row}")
