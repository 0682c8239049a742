"""Small weights, known gradients, and steps of an AdapterOptimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.train.optim import AdapterOptimizer, optimizer_maker


def make_adamw(weight_decay: float = 0.01) -> Any:
    return optimizer_maker("adamw", (0.9, 0.99), 1e-8, weight_decay, torch.device("cpu"))[0]


def random_weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in (("a", (4, 9)), ("b", (9, 4)))}


def gradient(step: int, like: Tensor) -> Tensor:
    torch.manual_seed(step)
    return torch.randn(like.shape).to(like.dtype)


def run(optimizer: AdapterOptimizer, steps: range, lr: float = 1e-3) -> None:
    for step in steps:
        for parameter in optimizer.parameters.values():
            parameter.grad = gradient(step, parameter)
        optimizer.set_lr(lr * (1 + step % 3))
        optimizer.step()
        optimizer.zero_grad()


def copies(optimizer: AdapterOptimizer) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(parameter.detach().clone()) for name, parameter in optimizer.parameters.items()}
