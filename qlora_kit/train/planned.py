"""What the plan says of a run that begins."""

from __future__ import annotations

import psutil
import torch

from qlora_kit.errors import AdapterError, ModelError, TrainingError
from qlora_kit.plan import Plan, fitting, format_bytes, plan_recipe
from qlora_kit.recipe import Recipe


def planned(recipe: Recipe) -> Plan | None:
    """The plan of a recipe on this machine; None where the plan does not know its model or task."""
    try:
        return plan_recipe(recipe, "cuda" if torch.cuda.is_available() else "cpu")
    except (ModelError, AdapterError):  # what is wrong with them training says, when it has looked at the weights
        return None


def refuse_what_cannot_fit(recipe: Recipe, plan: Plan | None, free: int | None = None) -> None:
    """Stops before anything is loaded where the plan takes more than there is.

    Args:
        free: bytes of the device that may be used; None asks the machine.

    Raises:
        TrainingError: says how much is missing, and what would fit.
    """
    free = free_bytes() if free is None else free
    if plan is None or plan.total_bytes <= free:
        return
    found = fitting(recipe, free, plan.device)
    advice = f"Set {' '.join(found.overrides)}" if found else "Take a smaller base"
    raise TrainingError(
        f"this run would take {format_bytes(plan.total_bytes)}, and {format_bytes(free)} are free on this "
        f"machine's {plan.device} (qlora-kit plan shows the parts)",
        fix=f"{advice}, free some memory, or train --anyway",
    )


def free_bytes() -> int:
    """Memory that a run may take: of the GPU what is free, of the host what is available."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
