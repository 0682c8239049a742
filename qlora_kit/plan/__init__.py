"""Memory arithmetic before anything is loaded: `plan(recipe, find_config(recipe.base))`. Needs no torch."""

from qlora_kit.plan.base import Component
from qlora_kit.plan.device import device_here
from qlora_kit.plan.find_config import find_config
from qlora_kit.plan.memory import Plan, plan
from qlora_kit.plan.shapes import ARCHITECTURES, model_shapes
from qlora_kit.plan.show import print_plan

__all__ = ["ARCHITECTURES", "Component", "Plan", "device_here", "find_config", "model_shapes", "plan", "print_plan"]
