"""`qlora-kit plan`: what a recipe takes, or the fastest variant of it that fits into a budget."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from qlora_kit.atomic import write_atomically
from qlora_kit.plan.budget import Choice, must_fit, plan_recipe
from qlora_kit.plan.device import device_here
from qlora_kit.plan.show import print_plan
from qlora_kit.plan.show_bytes import format_bytes
from qlora_kit.plan.time import measured_flops_per_s
from qlora_kit.recipe_file import dump_recipe, load_recipe
from qlora_kit.section import size_in_bytes


def plan_command(options: argparse.Namespace) -> None:
    """Prints the plan; with a budget that of the recipe that fits, which it may write to a file."""
    recipe = load_recipe(options.recipe, options.overrides)
    device = options.device or device_here()
    choice = must_fit(recipe, size_in_bytes(options.budget), device) if options.budget else None
    chosen = choice.recipe if choice else recipe
    result = choice.plan if choice else plan_recipe(recipe, device)
    rate = measured_flops_per_s(chosen.base.compute_dtype, device) if options.measure else None
    if options.json:
        speed = {} if rate is None else {"flops_per_s": rate, "tokens_per_s": rate / result.flops_per_token}
        changes = {} if choice is None else {"overrides": choice.overrides, "time_against": choice.time_against}
        print(json.dumps(result.to_json() | speed | changes, indent=2))
    else:
        console = Console()
        print_plan(result, console, options.device is None, rate)
        if choice:
            _print_choice(choice, options.budget, console)
    if options.output:
        write_atomically(Path(options.output), dump_recipe(chosen))


def _print_choice(choice: Choice, budget: str, console: Console) -> None:
    """What was changed, what each change saves, and what all of them cost."""
    if not choice.changes:
        console.print(f"Fits into {budget} as it is, and nothing that fits is faster.", highlight=False)
        return
    console.print(f"Fits into {budget}, with these changes:", highlight=False)
    for key, before, after, saved in choice.changes:
        buys = f"saves {format_bytes(saved)}" if saved >= 0 else f"takes {format_bytes(-saved)} more"
        console.print(f"  {key}: {before} -> {after}, which {buys}", highlight=False)
    faster = choice.time_against < 1
    share = 100 * abs(choice.time_against - 1)
    console.print(
        f"  A token takes about {share:.0f}% {'less' if faster else 'more'} time than before.", highlight=False
    )
