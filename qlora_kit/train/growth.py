"""Adapters that change shape: in the middle of training, and when training starts from a finished one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qlora_kit.adapters.settings import AdapterSettings, LoraSettings
from qlora_kit.errors import TrainingError

if TYPE_CHECKING:
    from qlora_kit.train.session import Session


def resize_adapter(session: Session, step: int) -> None:
    """Gives weights and optimizer states the shapes that they have after `step`."""
    take_parameters(session, session.method.resize(session.plain, step, session.total_steps))


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
