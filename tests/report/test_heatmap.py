"""Heat maps: one cell a value, numbered, the stronger the larger; text escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from qlora_kit.report.chart import Chart, Series
from qlora_kit.report.heatmap import heatmap


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_cells() -> None:
    root = parsed(heatmap([[0.0, 0.5, 1.0], [0.25, 1.7, -0.1]], "a <b>", "j", "i"))
    cells = list(root.iter("rect"))
    assert [cell.get("fill-opacity") for cell in cells] == ["0.000", "0.500", "1.000", "0.250", "1.000", "0.000"]
    assert [cell[0].text for cell in cells][:2] == ["i = 1, j = 1: 0.000", "i = 1, j = 2: 0.500"]
    first, above = cells[0], cells[3]
    assert first.get("x") == above.get("x") and float(first.get("y", 0)) > float(above.get("y", 0))
    assert root.get("aria-label") == "a <b>"
    assert [text.text for text in root.iter("text")] == ["1", "3", "1", "2", "j", "i"]


def test_steps_and_nothing() -> None:
    root = parsed(heatmap([[0.1] * 4] * 2, "a", "j", "i", step=3))
    assert [text.text for text in root.iter("text")] == ["1", "10", "1", "4", "j", "i"]
    assert next(root.iter("rect"))[0].text == "i = 1, j = 1: 0.100"
    assert heatmap([], "a", "j", "i") == "" == heatmap([[]], "a", "j", "i")


def test_a_chart_over_something_else_than_steps() -> None:
    root = parsed(Chart("sizes", "size", [Series("a", [(2.0, 5.0)])], x_label="block").svg())
    assert "block" in {text.text for text in root.iter("text")}
    assert [title.text for title in root.iter("title")] == ["a, block 2: 5"]
