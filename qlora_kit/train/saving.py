"""Checkpoints of a session, and the one whose adapter becomes RUN/adapter."""

from __future__ import annotations

import os
import shutil

from qlora_kit.adapters.peft_format import fill_adapter, read_adapter, save_adapter
from qlora_kit.atomic import disk_error, sync
from qlora_kit.errors import CheckpointError
from qlora_kit.train.checkpoint import (
    METHOD_STATE,
    TrainState,
    check_whole,
    checkpoint_folder,
    prune_checkpoints,
    save_checkpoint,
)
from qlora_kit.train.growth import resize_adapter
from qlora_kit.train.records import keep_peaks
from qlora_kit.train.session import Session


def save(session: Session, state: TrainState) -> None:
    """Writes a checkpoint of this very moment, and removes those that are kept no longer."""
    state.data_position = session.batches.state_dict()
    state.grad_scaler = session.scaler.state_dict()
    state.elapsed_s += session.lap()
    keep_peaks(state)
    if session.accelerator.is_main_process:
        tensors, numbers = session.optimizer.state()
        tensors |= {f"{METHOD_STATE}{name}": value for name, value in session.method.state().items()}
        save_checkpoint(
            session.run.checkpoints,
            state,
            lambda folder: save_adapter(session.plain, session.method, folder, session.recipe.base.model),
            tensors,
            numbers,
        )
        _prune(session, state)
        session.run.update_manifest(step=state.step, checkpoint=state.step)
    session.accelerator.wait_for_everyone()


def publish(session: Session, state: TrainState) -> int:
    """Fills RUN/adapter, and the model in memory, with the best checkpoint's weights. Returns its step.

    Where the best one is damaged the last takes its place, and the manifest says so.
    """
    step = state.best_step or state.step
    try:
        check_whole(checkpoint_folder(session.run.checkpoints, step))
    except CheckpointError as error:
        if step == state.step:
            raise
        session.notes.append(f"the best checkpoint cannot be published, step {state.step} is: {error}")
        step = state.step
    if session.accelerator.is_main_process:
        for note in session.notes:
            session.run.note(note)
        _copy_adapter(session, step)
        _prune(session, state)  # a kill may have come between the last checkpoint and this
    session.accelerator.wait_for_everyone()
    if step != state.step:
        folder = checkpoint_folder(session.run.checkpoints, step) / "adapter"
        resize_adapter(session, step)
        fill_adapter(session.plain, session.method, read_adapter(folder).tensors, str(folder))
    return step


def _prune(session: Session, state: TrainState) -> None:
    prune_checkpoints(session.run.checkpoints, session.recipe.train.keep_checkpoints, state.best_step)


def _copy_adapter(session: Session, step: int) -> None:
    """From a checkpoint to RUN/adapter, whole or not at all."""
    run, partial = session.run, session.run.path / ".partial-adapter"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        session.method.publish(checkpoint_folder(run.checkpoints, step) / "adapter", partial)
        for file in sorted(partial.iterdir()):
            sync(file)
        shutil.rmtree(run.adapter, ignore_errors=True)
        os.replace(partial, run.adapter)
        sync(run.path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(run.adapter, error) from error
