"""AdaLoRA's budget: how many ranks are kept at a step, and which (Zhang et al. 2023, arXiv:2303.10512, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BudgetSchedule:
    """Ranks of all layers together: `start` for `warmup_steps`, then falling to `target` at step `fixed_from`."""

    start: int
    target: int
    warmup_steps: int
    fixed_from: int
    prune_every: int

    def ranks(self, step: int) -> int:
        """Ranks that are kept after `step` (equation 12, a cubic fall)."""
        if step <= self.warmup_steps:
            return self.start
        if step >= self.fixed_from:
            return self.target
        ahead = 1 - (step - self.warmup_steps) / (self.fixed_from - self.warmup_steps)
        return int((self.start - self.target) * ahead**3 + self.target)

    def prunes(self, step: int) -> bool:
        """Whether ranks are chosen anew after `step`."""
        return step >= self.fixed_from or (step > self.warmup_steps and step % self.prune_every == 0)


class Importance:
    """How much the loss depends on each weight: |w · ∂L/∂w|, smoothed over steps, times how much that varies.

    Attributes:
        sensitivity: Ī of equation 9, float32 in the weight's shape, by the weight's name.
        uncertainty: Ū of equation 10, likewise.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, clip_factor: float = 1.0) -> None:
        """Takes in the gradient of a step, clipped as the authors' code sees it: times `clip_factor`.

        A weight without one is one that the loss does not depend on.
        """
        value = weight.detach().float()
        now = torch.zeros_like(value)
        if weight.grad is not None:
            now = (value * weight.grad.float()).abs_().mul_(clip_factor)
        for kept in (self.sensitivity, self.uncertainty):
            kept[name] = kept[name].to(now.device) if name in kept else torch.zeros_like(now)
        smooth = self.sensitivity[name].mul_(self.beta1).add_(now, alpha=1 - self.beta1)
        self.uncertainty[name].mul_(self.beta2).add_((now - smooth).abs_(), alpha=1 - self.beta2)

    def score(self, name: str) -> Tensor:
        """Equation 11, in the weight's shape."""
        return self.sensitivity[name] * self.uncertainty[name]

    def clear(self) -> None:
        self.sensitivity.clear()
        self.uncertainty.clear()


def most_important(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Which ranks of all layers together are kept.

    Args:
        scores: of each rank [rank], by layer.
        budget: ranks to keep; fewer are kept where scores at the limit are equal.

    Returns: bool [rank], by layer.
    """
    together = torch.cat(list(scores.values())).cpu()  # torch has no deterministic kthvalue for CUDA
    pruned = len(together) - budget
    if pruned <= 0:
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    limit = torch.kthvalue(together, pruned).values.item()
    return {name: score > limit for name, score in scores.items()}
