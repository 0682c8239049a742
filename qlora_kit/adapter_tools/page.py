"""An inspection as a page: one HTML file, no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from qlora_kit.adapter_tools.inspecting import Inspection, Layer
from qlora_kit.adapter_tools.tables import cells, columns, kinds
from qlora_kit.report.chart import Chart, Series
from qlora_kit.report.heatmap import heatmap
from qlora_kit.report.page import page_template

MOST_CELLS = 48  # of a heat map's side: a larger one is thinned out


def render_inspection(inspection: Inspection) -> str:
    """The page's HTML; names are escaped."""
    shown, by_kind = columns(inspection), kinds(inspection.layers)
    return page_template("adapter.html").render(
        adapter=inspection.adapter,
        other=inspection.other,
        notes=inspection.notes,
        headings=[heading for heading, _, _ in shown],
        means=[(f"{kind} ({len(layers)})", cells(layers, shown)) for kind, layers in by_kind.items()],
        rows=[(layer.name, cells([layer], shown)) for layer in inspection.layers],
        charts=[(kind, _charts(kind, layers)) for kind, layers in by_kind.items()],
    )


def _charts(kind: str, layers: list[Layer]) -> list[tuple[str, Markup]]:
    """(title, SVG) of one kind of layer: size over depth, singular values, and overlap."""
    related = layers[0].ratio is not None
    sizes = [(layer.block, layer.ratio if related else layer.norm) for layer in layers]
    depth = Series("size", [(float(block), size) for block, size in sizes if block is not None and size is not None])
    label = "‖Δ‖ / ‖W‖" if related else "‖Δ‖"
    values = Series("mean", list(enumerate(_means([layer.values for layer in layers]), start=1)))
    charts = [
        (label, Chart(f"{kind}: {label}", label, [depth], from_zero=True, x_label="block").svg()),
        (
            "Singular values",
            Chart(f"{kind}: singular values", "value, mean over blocks", [values], True, x_label="place").svg(),
        ),
    ]
    overlaps = [layer.overlap for layer in layers if layer.overlap]
    for side in ("input", "output"):
        matrix, title = _mean_matrix([getattr(overlap, side) for overlap in overlaps]), f"φ(i, j), {side} side"
        step = math.ceil(max(len(matrix), *map(len, matrix), 1) / MOST_CELLS)
        thin = [row[::step] for row in matrix[::step]]
        labels = ("j, of the other adapter", "i, of this one")
        charts.append((title, heatmap(thin, f"{kind}: {title}", *labels, step)))
    return [(title, svg) for title, svg in charts if svg]


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    """Place by place; a list that ends earlier does not count where it has nothing."""
    found = []
    for place in range(max(map(len, lists), default=0)):
        values = [values[place] for values in lists if place < len(values)]
        found.append(sum(values) / len(values))
    return found


def _mean_matrix(matrices: list[list[list[float]]]) -> list[list[float]]:
    """Means over the part that all matrices have."""
    if not matrices:
        return []
    rows, width = min(map(len, matrices)), min(len(matrix[0]) for matrix in matrices)
    return [[sum(matrix[i][j] for matrix in matrices) / len(matrices) for j in range(width)] for i in range(rows)]
