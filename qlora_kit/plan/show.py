"""A plan as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qlora_kit.plan.memory import Plan


def print_plan(plan: Plan, console: Console, found_here: bool = False) -> None:
    """Prints every component in bytes that people read, exact ones first, and both sums.

    Args:
        found_here: whether the device was not asked for but is what this machine has: the first line says so.
    """
    if found_here:
        here, other = ("its GPU", "cpu") if plan.device == "cuda" else ("a CPU, as it has no GPU", "cuda")
        console.print(f"For this machine: {here}; --device {other} plans for the other.", highlight=False)
    counts = f"{_count(plan.base_parameters)} base weights, {_count(plan.trainable_parameters)} trained"
    table = Table(title=f"{plan.model}: {counts}, on {plan.device}", title_justify="left")
    table.add_column("memory")
    table.add_column("size", justify="right")
    table.add_column("how")
    for part in (*_parts(plan, exact=True), ("stored", plan.exact_bytes, "exact"), None):
        _add(table, part)
    for part in (*_parts(plan, exact=False), ("in use", plan.rough_bytes, "rough estimate, can be off by half"), None):
        _add(table, part)
    for held in plan.loading:
        _add(table, (held.name, held.bytes, held.note))
    if plan.loading:
        _add(table, ("loading", plan.loading_bytes, "before the first step; none of it stays"))
        table.add_section()
    outside = "without CUDA's context, Python and its libraries"
    larger = "of loading, which takes more than training; " if plan.total_bytes == plan.loading_bytes else ""
    _add(table, ("total", plan.total_bytes, larger + outside))
    console.print(table)


def _parts(plan: Plan, exact: bool) -> list[tuple[str, int, str]]:
    return [(part.name, part.bytes, part.note) for part in plan.components if part.exact is exact]


def _add(table: Table, part: tuple[str, int, str] | None) -> None:
    if part is None:
        table.add_section()
        return
    name, size, note = part
    strong = "bold" if name in ("stored", "in use", "loading", "total") else ""
    table.add_row(name, format_bytes(size), note, style=strong)


def format_bytes(size: int) -> str:
    """1536 as `1.5 KiB`: the largest binary unit in which the number is at least 1."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
