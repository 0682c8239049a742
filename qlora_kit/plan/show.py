"""A plan as a table and a bar in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.plan.memory import Plan
from qlora_kit.plan.moments import Moment
from qlora_kit.plan.show_bytes import format_bytes

_COLOURS = (
    "blue",
    "green",
    "yellow",
    "magenta",
    "cyan",
    "red",
    "white",
    "bright_blue",
    "bright_green",
    "bright_yellow",
)
_BAR = 72  # characters


def print_plan(plan: Plan, console: Console, found_here: bool = False, flops_per_s: float | None = None) -> None:
    """Prints what is stored, what each moment of the run holds, and the highest of them as a bar.

    Args:
        found_here: whether the device was not asked for but is what this machine has: the first line says so.
        flops_per_s: a rate measured here, for an estimate of speed.
    """
    if found_here:
        here, other = ("its GPU", "cpu") if plan.device == "cuda" else ("a CPU, as it has no GPU", "cuda")
        console.print(f"For this machine: {here}; --device {other} plans for the other.", highlight=False)
    counts = f"{_count(plan.base_parameters)} base weights, {_count(plan.trainable_parameters)} trained"
    table = Table(title=f"{plan.model}: {counts}, on {plan.device}", title_justify="left")
    table.add_column("memory")
    table.add_column("size", justify="right")
    table.add_column("how")
    _add_stored(table, plan)
    _add_beside(table, plan)
    for moment in plan.moments:
        table.add_row(moment.name, format_bytes(moment.bytes), "peak")
    _add_loading(table, plan)
    outside = "beside Python with its libraries (0.35 GiB)" + (" and CUDA's context" if plan.device == "cuda" else "")
    larger = "of loading, which takes more than training; " if plan.total_bytes == plan.loading_bytes else ""
    table.add_row("total", format_bytes(plan.total_bytes), larger + outside, style="bold")
    for part in plan.host:
        mapped = ", mapped to the checkpoint's files" if part.mapped else ""
        table.add_row(f"{part.name}, on the host", format_bytes(part.bytes), part.note + mapped)
    _add_export(table, plan)
    console.print(table)
    _print_bar(plan.highest, console)
    console.print(_speed(plan, flops_per_s), highlight=False)


def _add_stored(table: Table, plan: Plan) -> None:
    for part in plan.components:
        mapped = "; mapped to the checkpoint's files, not counted" if part.mapped and part.bytes else ""
        table.add_row(part.name, format_bytes(part.bytes), part.note + mapped)
    table.add_row("stored", format_bytes(plan.exact_bytes), "exact", style="bold")
    table.add_section()


def _add_beside(table: Table, plan: Plan) -> None:
    """What the highest moment holds beside what is stored."""
    for name, size in plan.beside.items():
        table.add_row(name, format_bytes(size), f"at the peak: {plan.highest.name}")
    table.add_row("in use", format_bytes(plan.in_use_bytes), "comes and goes", style="bold")
    table.add_section()


def _add_loading(table: Table, plan: Plan) -> None:
    for held in plan.loading:
        table.add_row(held.name, format_bytes(held.bytes), held.note)
    if plan.loading:
        table.add_row("loading", format_bytes(plan.loading_bytes), "before the first step; none stays", style="bold")
    table.add_section()


def _add_export(table: Table, plan: Plan) -> None:
    table.add_section()
    for part in plan.export:
        table.add_row(f"{part.name}, on disk", format_bytes(part.bytes), part.note)
    if plan.export:
        table.add_row("export", format_bytes(plan.export_bytes), "of disk, at most", style="bold")


def _print_bar(moment: Moment, console: Console) -> None:
    """The parts of a moment side by side, as long as they are large; the smallest are left to the table."""
    bar, legend = Text(), Text()
    largest = sorted(moment.parts.items(), key=lambda part: -part[1])[: len(_COLOURS)]
    for (name, size), colour in zip(largest, _COLOURS):
        length = round(_BAR * size / moment.bytes)
        if length:
            bar.append("█" * length, style=colour)
            legend.append("█ ", style=colour)
            legend.append(f"{name} {100 * size / moment.bytes:.0f}%  ")
    console.print(bar)
    console.print(legend)


def _speed(plan: Plan, flops_per_s: float | None) -> str:
    work = f"{plan.flops_per_token / 1e9:.2f} GFLOP a token"
    if flops_per_s is None:
        return f"{work}; --measure times a product here and says how many tokens a second that makes at most."
    rate = f"at {flops_per_s / 1e9:.0f} GFLOP/s, measured here"
    return f"{work}; {rate}: {flops_per_s / plan.flops_per_token:.1f} tokens/s at most"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
