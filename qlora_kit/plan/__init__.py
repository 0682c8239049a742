"""Memory arithmetic before anything is loaded: `plan(recipe, find_config(recipe.base))`. Needs no torch."""

from qlora_kit.plan.base import Component
from qlora_kit.plan.budget import Choice, fitting, must_fit, plan_recipe
from qlora_kit.plan.device import device_here
from qlora_kit.plan.find_config import find_config
from qlora_kit.plan.headers import stored_dtype
from qlora_kit.plan.memory import Plan, plan
from qlora_kit.plan.shapes import ARCHITECTURES, model_shapes
from qlora_kit.plan.show import print_plan
from qlora_kit.plan.show_bytes import format_bytes
from qlora_kit.plan.time import measured_flops_per_s

__all__ = [
    "ARCHITECTURES",
    "Choice",
    "Component",
    "Plan",
    "device_here",
    "find_config",
    "fitting",
    "format_bytes",
    "measured_flops_per_s",
    "model_shapes",
    "must_fit",
    "plan",
    "plan_recipe",
    "print_plan",
    "stored_dtype",
]
