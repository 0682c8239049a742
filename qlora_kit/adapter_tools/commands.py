"""`qlora-kit adapters`: list, combine, convert, attach, inspect."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_kit.adapter_tools.attaching import attach
from qlora_kit.adapter_tools.combining import combine_sources
from qlora_kit.adapter_tools.converting import convert
from qlora_kit.adapter_tools.inspecting import inspect
from qlora_kit.adapter_tools.listing import describe, find_adapters, print_list
from qlora_kit.adapter_tools.page import render_inspection
from qlora_kit.adapter_tools.sources import open_source
from qlora_kit.adapter_tools.tables import print_inspection
from qlora_kit.adapters.combine import Combination
from qlora_kit.atomic import write_atomically
from qlora_kit.train.run_folder import RunFolder

WIDTH = 140  # columns


def run_adapters(options: argparse.Namespace) -> None:
    """Does the action, and prints what came of it: tables for people, JSON for programs."""
    actions = {"list": _list, "combine": _combine, "convert": _convert, "attach": _attach, "inspect": _inspect}
    actions[options.action](options)


def _console() -> Console:
    """Wide enough for the tables: a narrower terminal breaks lines, where rich would cut numbers off."""
    return Console(width=max(WIDTH, Console().width))


def _list(options: argparse.Namespace) -> None:
    rows = [describe(folder) for folder in find_adapters([Path(path) for path in options.folders or ["runs"]])]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        print_list(rows, _console())


def _combine(options: argparse.Namespace) -> None:
    note = combine_sources(
        [open_source(folder) for folder in options.folders],
        options.weights,
        Path(options.output),
        Combination(options.method, options.rank, options.density, options.seed, options.dtype),
        options.force,
    )
    if options.json:
        print(json.dumps(note, indent=2, ensure_ascii=False))
        return
    layers = note["layers"]
    print(f"{options.output}: {options.method} of {len(options.folders)} adapters, {len(layers)} layers")
    _print_shares("left out by the cut to a rank", {name: layer["lost"] for name, layer in layers.items()})
    _print_shares("distance from the weighted sum", {name: layer["from_sum"] for name, layer in layers.items()})
    cancelled = sum(layer["from_sum"] is None for layer in layers.values())
    if cancelled:
        print(f"  the weighted deltas cancel out in {cancelled} of {len(layers)} layers: their sum is nearly zero")
    if note["taken_in_full"]:
        print(f"  taken as they are, without a weight: {', '.join(note['taken_in_full'])}")


def _convert(options: argparse.Namespace) -> None:
    result = convert(open_source(options.folder), Path(options.output), options.rank, options.dtype)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{options.output}: LoRA in {result['dtype']}")
    _print_shares("left out by the cut to a rank", result["lost"])


def _attach(options: argparse.Namespace) -> None:
    made = attach(open_source(options.folder), RunFolder.open(options.run), Path(options.output), options.force)
    if options.json:
        print(json.dumps({"run": str(made.path), **made.manifest()["attached"]}, indent=2, ensure_ascii=False))
        return
    print(f"{made.path}: a run with {options.folder} on the base and data of {options.run}")


def _print_shares(what: str, shares: dict[str, float | None]) -> None:
    """A share of each layer's norm: the mean, and the worst layer. Layers without a norm (None) do not count."""
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return
    worst = max(known, key=lambda name: known[name])
    mean = sum(known.values()) / len(known)
    print(f"  {what}: {mean:.2%} of the norm, mean over layers; at most {known[worst]:.2%} ({worst})")


def _inspect(options: argparse.Namespace) -> None:
    other = open_source(options.other) if options.other else None
    inspection = inspect(open_source(options.folder), other, options.base)
    if options.output:
        write_atomically(Path(options.output), render_inspection(inspection))
    if options.json:
        tree: dict[str, Any] = inspection.to_json()
        print(json.dumps(tree, indent=2, ensure_ascii=False))
        return
    print_inspection(inspection, _console())
    if options.output:
        print(options.output)
