"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740).

torch.amp.GradScaler is not used: its unscale_ has no CUDA kernel for bf16 gradients, which a bf16 adapter has
under fp16 activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

GROWTH_INTERVAL = 2000  # steps in a row without an overflow, after which the scale is doubled


class LossScale:
    """Multiplies the loss so that small fp16 gradients do not vanish, and divides the gradients again.

    Args:
        enabled: whether activations are fp16; otherwise nothing is multiplied.
        scale: the first factor; a power of two, so that scaling rounds nothing.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16) -> None:
        self.enabled, self.scale, self.good_steps = enabled, scale, 0

    @property
    def factor(self) -> float | None:
        """The present factor; None unless enabled."""
        return self.scale if self.enabled else None

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.enabled else loss

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients in place; what overflowed stays infinite or no number."""
        for parameter in parameters if self.enabled else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.scale)

    def update(self, overflow: bool) -> None:
        """Halves the factor after an overflow, doubles it after GROWTH_INTERVAL steps without one."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data for JSON; empty unless enabled."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        if state and self.enabled:
            self.scale, self.good_steps = float(state["scale"]), int(state.get("good_steps", 0))
