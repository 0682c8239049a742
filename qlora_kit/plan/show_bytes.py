"""Sizes that people read."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """1536 as `1.5 KiB`: the largest binary unit in which the number is at least 1."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
