"""What was found, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.adapter_tools.inspecting import Inspection, Layer, Overlap

Column = tuple[str, Callable[[Layer], float | None], str]  # heading, value, format


def columns(inspection: Inspection) -> list[Column]:
    """What there is to say of a layer; the base's and the other adapter's only where they are there."""
    found: list[Column] = [("rank", lambda layer: layer.rank, ".0f"), ("‖Δ‖", lambda layer: layer.norm, ".4g")]
    if any(layer.weight_norm is not None for layer in inspection.layers):
        found += [
            ("‖Δ‖ / ‖W‖", lambda layer: layer.ratio, ".2%"),
            ("amplified", lambda layer: layer.amplification, ".3g"),
        ]
    found += [
        ("largest σ", lambda layer: layer.values[0], ".4g"),
        ("eff. rank", lambda layer: layer.effective_rank, ".1f"),
        ("90%", lambda layer: layer.energy_rank, ".0f"),
    ]
    if inspection.other:
        found += [
            ("φ input", of_overlap(lambda overlap: overlap.input[-1][-1]), ".3f"),
            ("chance", of_overlap(lambda overlap: overlap.input_by_chance), ".3f"),
            ("φ output", of_overlap(lambda overlap: overlap.output[-1][-1]), ".3f"),
            ("chance", of_overlap(lambda overlap: overlap.output_by_chance), ".3f"),
        ]
    return found


def of_overlap(value: Callable[[Overlap], float]) -> Callable[[Layer], float | None]:
    return lambda layer: None if layer.overlap is None else value(layer.overlap)


def kinds(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by the last part of their names."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer)
    return found


def cells(layers: Sequence[Layer], shown: list[Column]) -> list[str]:
    """The mean of each column over the layers that have a value."""
    texts = []
    for _, value, form in shown:
        values = [number for number in map(value, layers) if number is not None]
        texts.append(format(sum(values) / len(values), form) if values else "–")
    return texts


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Means by kind of layer, then every layer."""
    shown = columns(inspection)
    headings = [heading for heading, _, _ in shown]
    by_kind = kinds(inspection.layers)
    means = ([f"{kind} ({len(layers)})", *cells(layers, shown)] for kind, layers in by_kind.items())
    console.print(_table("means", ["layers", *headings], means))
    rows = ([layer.name, *cells([layer], shown)] for layer in inspection.layers)
    console.print(_table("every layer", ["layer", *headings], rows))
    for note in inspection.notes:
        console.print(note, markup=False)


def _table(title: str, headings: list[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
