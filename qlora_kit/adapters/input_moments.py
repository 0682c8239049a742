"""What goes into linear layers, on average over calibration rows: it says which errors of a weight matter.

A weight that is off by E moves a layer's output by E x. Over inputs x the mean square of that is ‖E R^½‖² in the
Frobenius norm, with R = mean of x xᵀ; where the inputs' features are taken as unrelated, R is its diagonal, the mean
squares (QERA, Zhang et al. 2024, arXiv:2410.06040, theorems 1 and 2; LQ-LoRA, Guo et al. 2023, arXiv:2311.12023,
weighs by Fisher information instead).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_kit.errors import AdapterError

DAMPING = 1e-4  # of the mean square of a feature: what no calibration row excites still counts a little


class Weighing(NamedTuple):
    """R^½ and its inverse, float32: [in] where R is diagonal, else symmetric [in, in]."""

    root: Tensor
    inverse: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """rows [n, in] times R^½."""
        return rows * self.root if self.root.dim() == 1 else rows @ self.root

    def undo(self, rows: Tensor) -> Tensor:
        """rows [n, in] times R^-½."""
        return rows * self.inverse if self.inverse.dim() == 1 else rows @ self.inverse


def weighing(moment: Tensor) -> Weighing:
    """The weighing by a moment of `input_moments`, divided by its mean so that weights are around 1.

    Args:
        moment: R, symmetric and of no negative eigenvalue [in, in], or its diagonal [in].
    """
    squares = moment.double()
    squares = squares / (squares if squares.dim() == 1 else squares.diagonal()).mean().clamp_min(1e-300)
    if squares.dim() == 1:
        root = (squares + DAMPING).sqrt()
        return Weighing(root.float(), root.reciprocal().float())
    values, vectors = torch.linalg.eigh(squares)
    root = (values.clamp_min(0) + DAMPING).sqrt()
    return Weighing(((vectors * root) @ vectors.T).float(), ((vectors / root) @ vectors.T).float())


@torch.no_grad()
def input_moments(
    model: nn.Module, names: list[str], batches: Iterable[Mapping[str, Tensor]], full: bool = False
) -> dict[str, Tensor]:
    """The mean of x xᵀ over what goes into each layer, padding left out; of one input, layers share one tensor.

    Args:
        model: whole or quantized, without an adapter; it is run in evaluation mode.
        names: of its linear layers.
        batches: input_ids and attention_mask, int64 [batch, seq].
        full: the whole matrix, whose memory is in² numbers, not its diagonal alone.

    Returns: layer to float32 [in], or [in, in] where `full`.

    Raises:
        AdapterError: what goes into a layer is not [batch, seq, in].
    """
    watch, training = _Watch(full), model.training
    takes = inspect.signature(type(model).forward).parameters
    one_logit = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # nobody reads them
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch.hook(name)) for name in names]
    try:
        model.eval()
        for batch in batches:
            watch.start(batch["attention_mask"])
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **one_logit)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    means = {name: total / watch.tokens for name, total in watch.totals.items()}
    return {name: means[leader] for name, leader in watch.leaders.items()}


class _Watch:
    """Adds up what goes into layers; the first of those that get the very same tensor counts for all of them."""

    def __init__(self, full: bool) -> None:
        self.full, self.tokens = full, 0
        self.totals: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}
        self.real = torch.empty(0, dtype=torch.bool)
        self._last: tuple[str, Tensor] | None = None

    def start(self, mask: Tensor) -> None:
        self.real, self._last = mask.bool(), None
        self.tokens += int(mask.sum())

    def hook(self, name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._last is None or args[0] is not self._last[1]:
                self._last = (name, args[0])
                self._add(name, self._rows(name, args[0]))
            self.leaders[name] = self._last[0]

        return look

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """x [batch, seq, in] to float32 [tokens, in], padding left out."""
        if x.shape[:-1] != self.real.shape:
            raise AdapterError(
                f"{name}: its input is not one row a token", got=list(x.shape), fix="Set adapter.calibration_rows=0"
            )
        return x[self.real].float()

    def _add(self, name: str, x: Tensor) -> None:
        """x [tokens, in]."""
        moment = x.T @ x if self.full else x.square().sum(0)
        self.totals[name] = moment if name not in self.totals else self.totals[name].add_(moment)
