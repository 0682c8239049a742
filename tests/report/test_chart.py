"""Charts: round ticks, no lost spikes, broken lines where values are missing."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from qlora_kit.report.chart import HEIGHT, WIDTH, Chart, Series, smooth, thin_out, ticks


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 300, True, [0, 100, 200, 300]),
        (1, 3, True, [1, 2, 3]),
        (0.0, 2e-4, False, [0.0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (5.0, 5.0, False, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (0.0, 0.0, False, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, whole) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.3, 1.0, 7.0, 1e6, 1e12])
def test_ticks_cover_any_range_with_few_lines(scale: float) -> None:
    for high in (1.0, 1.1, 3.7, 9.99):
        found = ticks(0.1 * scale, high * scale)
        assert found[0] <= 0.1 * scale * (1 + 1e-9) and found[-1] >= high * scale * (1 - 1e-9)
        assert 3 <= len(found) <= 8 and len(set(found)) == len(found)


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(step), 0.0) for step in range(50_000)]
    points[12_345] = (12_345.0, 99.0)
    points[40_000] = (40_000.0, -99.0)
    points[20_000] = (20_000.0, math.nan)
    kept = thin_out(points)
    assert len(kept) <= 610
    assert (12_345.0, 99.0) in kept and (40_000.0, -99.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin_out(points[:10]) == points[:10]


def test_smoothing_is_a_trailing_mean() -> None:
    points = [(float(step), float(step % 2)) for step in range(20)]
    assert smooth(points)[10] == (10.0, pytest.approx(0.4))
    assert smooth([(1.0, 2.0), (2.0, math.nan), (3.0, 4.0)]) == [(1.0, 2.0), (3.0, 3.0)]


def paths(svg: str) -> list[str]:
    return re.findall(r'class="line[^"]*" d="([^"]*)"', svg)


def test_a_missing_value_breaks_the_line() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 1.0), (5.0, 2.0)]
    (path,) = paths(Chart("t", "y", [Series("a", points)]).svg())
    assert path.count("M") == 2 and path.count("L") == 2


def test_everything_lies_inside_the_frame_and_is_well_formed() -> None:
    series = [Series("a <b>", [(10.0, -3.0), (500.0, 1e3)]), Series("c", [(250.0, 17.0)], "s2", dots=True)]
    root = ElementTree.fromstring(Chart("x & y", "loss (nats)", series, from_zero=True, marks=[20, 9999]).svg())
    numbers = [float(n) for path in root.iter("path") for n in re.findall(r"[\d.]+", path.get("d", ""))]
    assert all(0 <= n <= max(WIDTH, HEIGHT) for n in numbers)
    words = [text.text for text in root.iter("text")]
    assert {"a <b>", "c", "loss (nats)", "optimizer step", "0"} <= set(words)
    assert [mark.get("class") for mark in root.iter("path")].count("mark") == 1
    assert [title.text for title in root.iter("title")] == ["resumed after step 20", "c, step 250: 17"]


def test_one_point_is_a_dot_and_nothing_is_no_chart() -> None:
    assert "<circle" in Chart("t", "y", [Series("a", [(3.0, 2.0)])]).svg()
    assert Chart("t", "y", [Series("a", [(3.0, math.nan)]), Series("b", [])]).svg() == ""
