"""Heat maps as inline SVG, for shares from 0 to 1: the stronger the colour, the larger the share."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_CELLS, _LEFT, _BOTTOM, _TOP = 320, 56, 44, 8


def heatmap(rows: Sequence[Sequence[float]], title: str, x_label: str, y_label: str, step: int = 1) -> Markup:
    """Row 1, column 1 at the bottom left; each cell says its value as a tooltip.

    Args:
        step: what one cell more counts: cells are numbered 1, 1 + step, ...
    """
    if not rows or not rows[0]:
        return Markup("")
    size = _CELLS / max(len(rows), len(rows[0]))
    width, height = size * len(rows[0]), size * len(rows)
    parts = [
        Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" style="max-width: 420px">').format(
            _LEFT + _CELLS + 12, _TOP + height + _BOTTOM, title
        )
    ]
    cell = Markup(
        '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}">'
        "<title>i = {}, j = {}: {:.3f}</title></rect>"
    )
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            x, y = _LEFT + j * size, _TOP + height - (i + 1) * size
            share = min(1.0, max(0.0, value))
            parts.append(cell.format(x, y, size, size, share, 1 + i * step, 1 + j * step, value))
    label = Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    bottom = _TOP + height + 16
    for j in sorted({0, len(rows[0]) - 1}):
        parts.append(label.format(_LEFT + (j + 0.5) * size, bottom, "middle", 1 + j * step))
    for i in sorted({0, len(rows) - 1}):
        parts.append(label.format(_LEFT - 6, _TOP + height - (i + 0.5) * size + 4, "end", 1 + i * step))
    parts.append(label.format(_LEFT + width / 2, bottom + 20, "middle", x_label))
    turned = Markup('<text class="label" transform="translate(16 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>')
    return Markup("\n").join([*parts, turned.format(_TOP + height / 2, y_label), Markup("</svg>")])
