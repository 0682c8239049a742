"""Out of memory is not the end: a step is done again in smaller micro batches of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qlora_kit.data.masking import Encoded
from qlora_kit.train.adapted_model import add_gradients_in_fp32
from qlora_kit.train.failures import out_of_memory
from qlora_kit.train.memory_limit import give_back
from qlora_kit.train.micro_batches import SMALLER

if TYPE_CHECKING:
    from qlora_kit.train.session import Session

T = TypeVar("T")
CPU_SHORTAGE = ("can't allocate memory", "not enough memory")  # torch has no type for it


def in_less_memory(session: Session, step: int, attempt: Callable[[], T]) -> T:
    """What `attempt` returns; each time that memory runs out micro batches are halved and it is tried again.

    A failed attempt leaves nothing behind: gradients, and statistics that a forward pass moves, are as before.

    Raises:
        OutOfMemory: micro batches are of one row, or several processes train, which cannot go back one by one.
    """
    statistics = _running_statistics(session.plain)
    micro = session.micro_batches
    while True:
        if micro.at(step) < micro.size:
            add_gradients_in_fp32(session.optimizer.parameters)  # a step is of several micro batches now
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            shortage = shortage_of(error)
            if shortage is None:
                raise
        # Here the error is gone, and with it the tensors that its traceback held.
        session.optimizer.zero_grad()
        for tensor, before in statistics:
            tensor.copy_(before)
        give_back()
        if micro.at(step) == 1 or session.accelerator.num_processes > 1:
            raise out_of_memory(session, step - 1, shortage)
        halve(session, step, shortage)


def halve(session: Session, step: int, shortage: str) -> None:
    """Micro batches of half as many rows from `step` on; written down, so that a resume goes the same way."""
    micro = session.micro_batches
    before = micro.at(step)
    micro.smaller = [*micro.smaller, (step, (before + 1) // 2)]
    note = f"step {step}: out of memory with micro batches of {before} rows ({shortage}); on with {micro.at(step)}"
    session.say(f"{note}, the rows of a step are the same")
    session.run.note(note)
    session.run.update_manifest(**{SMALLER: micro.smaller})


def probe_longest(session: Session, step: int) -> None:
    """Tries a micro batch of the longest rows, where memory is limited: what will fail does so before the first step.

    It changes no weight, no random state and no order of rows. A stream's rows are not known beforehand.
    """
    limited = session.memory.limit_bytes is not None or session.memory.device.type == "cuda"
    if not limited or not len(session.data.train):
        return
    longest = np.argsort(-session.data.train.lengths(), kind="stable")[: session.micro_batches.at(step)]
    rows: list[Encoded] = [session.data.train[int(place)] for place in longest]
    statistics = _running_statistics(session.plain)

    def attempt() -> None:
        group = session.micro_batches.groups(rows, step)[0]
        losses = session.losses(session.collate(group), group)
        session.memory.check()
        losses.sum().backward()
        session.memory.check()

    with torch.random.fork_rng():
        in_less_memory(session, step, attempt)
    session.optimizer.zero_grad()
    for tensor, before in statistics:
        tensor.copy_(before)


def shortage_of(error: BaseException) -> str | None:
    """The first line of an error that says that memory ran out; None of any other."""
    line = (str(error).splitlines() or [""])[0]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in line for words in CPU_SHORTAGE)
    return (line or type(error).__name__) if known else None


def _running_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(tensor, its value now) of what forward passes move: the averages of batch normalization."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
