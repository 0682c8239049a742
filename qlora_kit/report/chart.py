"""Line charts as inline SVG: coloured by the page's CSS, so that they follow its light and dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 30, 46
_MAX_POINTS = 600  # more than the plot has pixels would only make the page heavy


@dataclass(frozen=True)
class Series:
    """One line. A y that is not finite breaks it.

    Attributes:
        style: CSS class of its colour, `s1` or `s2`.
        faint: thin and pale, a backdrop without a place in the legend.
        dots: a mark with a tooltip at every point, for the few points of an evaluation.
    """

    label: str
    points: Sequence[Point]
    style: str = "s1"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Axes and what lies in them. `y_label` names the unit; `marks` are steps with a vertical line."""

    title: str
    y_label: str
    series: list[Series]
    from_zero: bool = False
    marks: Sequence[float] = ()
    tick: Callable[[float], str] = "{:g}".format
    x_label: str = "optimizer step"

    def svg(self) -> Markup:
        """The chart, or an empty string where no series has a finite point."""
        points = [point for series in self.series for point in series.points if math.isfinite(point[1])]
        if not points:
            return Markup("")
        xs, ys = [x for x, _ in points], [y for _, y in points]
        x_ticks = ticks(min(xs), max(xs), whole=True)
        y_ticks = ticks(min(0.0, *ys) if self.from_zero else min(ys), max(ys))
        scale = _Scale(min(xs), max(xs), y_ticks[0], y_ticks[-1])
        parts = [
            Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, self.title),
            *_grid(scale, [x for x in x_ticks if min(xs) <= x <= max(xs)], y_ticks, self.tick),
            *(_vertical(scale, step) for step in self.marks if min(xs) <= step <= max(xs)),
            *(_line(series, scale, self.x_label.split()[-1]) for series in self.series),
            *_labels(
                self.x_label, self.y_label, [series for series in self.series if not series.faint and series.points]
            ),
            Markup("</svg>"),
        ]
        return Markup("\n").join(parts)


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        share = (value - self.x_low) / span if self.x_high > self.x_low else 0.5
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers (1, 2 or 5 times a power of ten apart) that cover low..high.

    Args:
        whole: whole numbers only, for steps.
    """
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        spacing = max(1.0, spacing)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    # Rounded, because 3 * 0.1 is 0.30000000000000004.
    digits = max(0, 1 - math.floor(math.log10(spacing)))
    return [round(index * spacing, digits) for index in range(first, last + 1)]


def thin_out(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each bucket the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        broken = [point for point in bucket if not math.isfinite(point[1])]
        finite = [point for point in bucket if math.isfinite(point[1])]
        extremes = (
            {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        )
        kept += sorted(extremes | set(broken[:1]))
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and those before it, over a fiftieth of all points, five at least."""
    window = max(5, len(points) // 50)
    finite = [point for point in points if math.isfinite(point[1])]
    found = []
    for index, (x, _) in enumerate(finite):
        recent = [y for _, y in finite[max(0, index + 1 - window) : index + 1]]
        found.append((x, sum(recent) / len(recent)))
    return found


def _grid(scale: _Scale, xs: list[float], ys: list[float], tick: Callable[[float], str]) -> list[Markup]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    horizontal = Markup(
        '<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    )
    vertical = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
    lines = [horizontal.format(_LEFT, scale.y(y), right, _LEFT - 8, scale.y(y) + 4, tick(y)) for y in ys]
    lines += [vertical.format(scale.x(x), bottom + 18, f"{x:g}") for x in xs]
    return [*lines, Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, right)]


def _labels(x_label: str, y_label: str, named: list[Series]) -> list[Markup]:
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts = [
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 8, x_label
        ),
        Markup('<text class="label" transform="translate(16 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        ),
    ]
    place = float(_LEFT)
    for series in named if len(named) > 1 else []:
        parts.append(
            Markup('<path class="line {}" d="M{} 12h18"/><text class="label" x="{}" y="16">{}</text>').format(
                series.style, place, place + 24, series.label
            )
        )
        place += 44 + 7 * len(series.label)
    return parts


def _vertical(scale: _Scale, step: float) -> Markup:
    line = Markup('<path class="mark" d="M{} {}V{}"><title>resumed after step {}</title></path>')
    return line.format(scale.x(step), _TOP, HEIGHT - _BOTTOM, f"{step:g}")


def _line(series: Series, scale: _Scale, unit: str) -> Markup:
    path, pen = [], "M"
    for x, y in thin_out(series.points):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{scale.x(x)} {scale.y(y)}")
        pen = "L"
    faint = " faint" if series.faint else ""
    parts = [Markup('<path class="line {}{}" d="{}"/>').format(series.style, faint, "".join(path))]
    finite = [point for point in series.points if math.isfinite(point[1])]
    if series.dots or len(finite) == 1:  # a path of one point draws nothing
        dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="4"><title>{}</title></circle>')
        parts += [
            dot.format(series.style, scale.x(x), scale.y(y), escape(f"{series.label}, {unit} {x:g}: {y:.4g}"))
            for x, y in finite
        ]
    return Markup("").join(parts)
