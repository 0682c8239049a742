"""Adapters that change shape: in the middle of training, and when training starts from a finished one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from qlora_kit.adapters.settings import AdapterSettings, LoraSettings
from qlora_kit.errors import TrainingError
from qlora_kit.recipe import TrainSection
from qlora_kit.train.optim import lr_at

EAGERNESS = 1.5
"""The first steps of a run teach more than later ones. Chosen on one run of GSM8K: it ended at 0.945 with 1, at 0.923
with this, and at 0.928 where the rank was large from the start."""
HIGHEST_GAIN = 2.5
"""More did harm where little is left to learn: from half of a run on sentiment, 4 and 10 ended worse than 1."""

if TYPE_CHECKING:
    from qlora_kit.train.session import Session


def resize_adapter(session: Session, step: int) -> None:
    """Gives weights and optimizer states the shapes that they have after `step`."""
    total = session.total_steps
    gain = partial(catch_up, session.recipe.train, step, total)
    take_parameters(session, session.method.resize(session.plain, step, total, gain))


def catch_up(train: TrainSection, step: int, total_steps: int) -> float:
    """How much larger than at the start new rows of A are, so that ranks that come after `step` learn what they missed.

    Adam moves weights by the learning rate, whatever the size of their gradients: how far B A gets goes with the sum
    of learning rates and with the size of A. New ranks see what is left of that sum, and less while their first
    moments, which start at zero, fill up.
    """
    rates = [lr_at(k, 1.0, train.schedule, train.warmup_steps, total_steps) for k in range(1, total_steps + 1)]
    left = sum(rate * (1 - train.betas[0] ** k) for k, rate in enumerate(rates[step:], 1))
    return min(EAGERNESS * sum(rates) / left, HIGHEST_GAIN) if left else 1.0


def check_growth(adapter: AdapterSettings, total_steps: int) -> None:
    """Raises a TrainingError where the rank would grow after the last step, to what nothing trains."""
    for stage in adapter.growth if isinstance(adapter, LoraSettings) else ():
        if stage.at * total_steps > total_steps - 1:
            raise TrainingError(
                f"adapter.growth: rank {stage.rank} comes after the last of {total_steps} steps",
                got=f"at: {stage.at:g}",
                allowed=f"at most {(total_steps - 1) / total_steps:g}",
                fix="Let it grow earlier, or train longer",
            )


def take_parameters(session: Session, parameters: dict[str, nn.Parameter]) -> None:
    """Trains on with other parameters of the same names.

    Raises:
        TrainingError: several processes train, of which DistributedDataParallel knows the old ones.
    """
    if parameters and session.accelerator.num_processes > 1:
        raise TrainingError(
            "the adapter's rank changes, which needs one process",
            got=session.accelerator.num_processes,
            allowed="1 process",
            fix="Launch one, or start with the last rank",
        )
    session.optimizer.replace(parameters)
