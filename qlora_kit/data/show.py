"""`qlora-kit data show`: rows as the model sees them, and what became of all of them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.data.dataset import PreparedData, prepare
from qlora_kit.data.kinds import LANGUAGE, RowKind
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.stream import StreamedTrain
from qlora_kit.recipe import DataSection

OPEN, CLOSE = "⟦", "⟧"  # around tokens that carry loss, for screens without colour


def show(
    section: DataSection, tokenizer: Any, rows: int, console: Console, seed: int = 42, kind: RowKind = LANGUAGE
) -> PreparedData:
    """Prints the first `rows` training rows, the counts and the lengths.

    Of language modelling: the template, and rows with their loss marked. Of other tasks: rows with their labels.

    Args:
        tokenizer: with its chat template resolved.
        seed: the run's seed, which decides what is held out.
        kind: how rows are read, encoded and shown.

    Raises:
        DataError: as `prepare`.
    """
    data = prepare(section, tokenizer, seed, kind)
    if section.streaming:
        stream = StreamedTrain(section, tokenizer, seed, data.report.train)
        shown = [next(stream) for _ in range(rows)]
    else:
        shown = data.train[:rows]
    if not kind.own_labels:
        console.print(Text("Chat template", style="bold"))
        console.print(Text(tokenizer.chat_template or "none: prompt and completion are joined as they are"))
    for row in shown:
        with_loss = "" if kind.own_labels else f", {row.loss_tokens} with loss"
        title = f"{data.describe_row(row)}: {len(row.input_ids)} tokens{with_loss}"
        console.rule(Text(title + (", cut" if row.truncated else "")))
        console.print(Text(kind.shown(row, tokenizer)) if kind.own_labels else loss_text(row, tokenizer))
    console.rule()
    if not kind.own_labels:
        console.print(Text(f"{OPEN}bold green{CLOSE}: carries loss; dim: does not"))
    console.print(report_table(data))
    for line in data.report.warnings():
        console.print(Text(f"! {line}", style="yellow"))
    if len(data.train):
        console.print(Text("Tokens a row", style="bold"))
        console.print(histogram(data.train.lengths()))
    return data


def loss_text(row: Encoded, tokenizer: Any) -> Text:
    """A row's text: runs of tokens that carry loss bold green and between ⟦ and ⟧, the others dim."""
    text = Text()
    for carries, run in groupby(range(len(row.input_ids)), key=lambda k: row.labels[k] != IGNORED):
        ids = [int(row.input_ids[k]) for k in run]
        words = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(f"{OPEN}{words}{CLOSE}" if carries else words, style="bold green" if carries else "dim")
    return text


def report_table(data: PreparedData) -> Table:
    """The counts of every source, one a line."""
    table = Table()
    table.add_column("source", overflow="fold")
    names = ("schema", "read", "skipped", "held out", "used", "an epoch", "cut", "tokens", "with loss", "longest")
    for name in names:
        table.add_column(name, justify="right")
    for source in [*data.report.train, *([data.report.eval] if data.report.eval else [])]:
        counts = [source.read, sum(source.skipped.values()), source.held_out, source.used, source.drawn]
        counts += [source.truncated, source.tokens, source.loss_tokens, source.longest]
        kind = "eval: " if source is data.report.eval else ""
        table.add_row(Text(kind + source.path), source.schema or "", *(f"{count:,}" for count in counts))
    return table


def histogram(lengths: np.ndarray, bins: int = 10, width: int = 40) -> Text:
    """Rows by length as bars; lengths int [rows]."""
    counts, edges = np.histogram(lengths, bins=min(bins, max(1, int(np.ptp(lengths)))))
    text = Text()
    for count, left, right in zip(counts, edges, edges[1:]):
        bar = "█" * round(width * count / counts.max()) or ("▏" if count else "")
        text.append(f"{left:8.0f} to {right:6.0f} {count:7,} {bar}\n")
    return text
