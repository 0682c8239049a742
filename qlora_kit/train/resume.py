"""How a run begins, and how it goes on from a checkpoint: to the bit, or not at all."""

from __future__ import annotations

import os
import shutil

from qlora_kit.adapters.peft_format import fill_adapter, read_adapter
from qlora_kit.errors import CheckpointError
from qlora_kit.train import records
from qlora_kit.train.checkpoint import Checkpoint, TrainState, checkpoint_folders, newest_checkpoint, step_of
from qlora_kit.train.growth import resize_adapter
from qlora_kit.train.micro_batches import SMALLER
from qlora_kit.train.saving import save
from qlora_kit.train.session import Session
from qlora_kit.train.start_from import start_from


def begin(session: Session) -> TrainState:
    """A run at step 0, its recipe, tokenizer and manifest written.

    Raises:
        RunError: the folder holds a run that is not to be overwritten, or the disk is full.
    """
    source = start_from(session)
    if session.accelerator.is_main_process:
        session.run.begin(session.recipe)
        session.tokenizer.save_pretrained(session.run.tokenizer)
        session.run.update_manifest(**records.at_start(session), **({"init_from": source} if source else {}))
    state = TrainState(
        micro_batch_size=session.recipe.train.micro_batch_size,
        grad_accum_steps=session.recipe.train.grad_accum_steps,
        threads=session.threads,
        processes=session.accelerator.num_processes,
        device=session.accelerator.device.type,
        data_sha256=session.data.sha256,
        base_sha256=session.source.fingerprint(),
    )
    if source:
        save(session, state)  # from here on the run needs no other's files
    return state


def resume_from_checkpoint(session: Session) -> TrainState:
    """The state of the newest whole checkpoint, its weights filled in; step 0 where none was written yet.

    Raises:
        CheckpointError: no checkpoint is left, or the run would not go on as it began.
    """
    session.micro_batches.smaller = [(since, rows) for since, rows in session.run.manifest().get(SMALLER, [])]
    checkpoint, damaged = newest_checkpoint(session.run.checkpoints)
    if checkpoint is None:
        written = session.run.manifest().get("checkpoint")
        if written:
            raise CheckpointError(
                f"{session.run.checkpoints} holds no checkpoint, and the run had written one at step {written}",
                fix="Put the folder back, or start again with --overwrite",
            )
        session.run.overwrite = True  # the run that is resumed never got to a checkpoint
        return begin(session)
    state = checkpoint.state
    _check_same_conditions(session, state, checkpoint)
    stored = read_adapter(checkpoint.adapter)
    resize_adapter(session, state.step)
    fill_adapter(session.plain, session.method, stored.tensors, str(checkpoint.adapter))
    session.optimizer.load_state(checkpoint.optimizer_tensors, checkpoint.optimizer_numbers)
    session.method.load_state(checkpoint.method_tensors)
    if state.grad_scaler:
        session.scaler.load_state_dict(state.grad_scaler)
    session.batches.load_state_dict(state.data_position)
    session.accelerator.wait_for_everyone()  # all have read before anything is moved
    session.notes += [f"resumed from step {state.step}: {line}" for line in damaged] + _changed_tools(session)
    if session.accelerator.is_main_process:
        _go_on_in_folder(session, state)
    return state


def _go_on_in_folder(session: Session, state: TrainState) -> None:
    """Forgets what the run wrote after the checkpoint; damaged ones are set aside, where nothing counts them."""
    run = session.run
    for folder in checkpoint_folders(run.checkpoints):
        if step_of(folder) > state.step:
            aside = run.checkpoints / f"damaged-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
    run.drop_metrics_after(state.step)
    run.write_recipe(session.recipe)  # fields that may change on a resume may have changed
    resumes = [*run.manifest().get("resumes", []), state.step]
    recipe_sha256 = records.recipe_hash(session.recipe)
    run.update_manifest(status="running", step=state.step, resumes=resumes, recipe_sha256=recipe_sha256)
    for note in session.notes:
        run.note(note)


def _changed(session: Session) -> str:
    """The sources that are not as the manifest names them, for a message."""
    paths = session.data.changed_since(session.run.manifest().get("data", {}))
    return f" (changed: {', '.join(paths)})" if paths else ""


def _check_same_conditions(session: Session, state: TrainState, checkpoint: Checkpoint) -> None:
    files = {
        "another base model than base.model now holds": (state.base_sha256, session.source.fingerprint()),
        f"other data than data.train and data.eval now hold{_changed(session)}": (
            state.data_sha256,
            session.data.sha256,
        ),
    }
    for what, (was, now) in files.items():
        if was != now:
            raise CheckpointError(
                f"{checkpoint.folder} was trained on {what}", fix="Put the files back, or start a new run"
            )
    device = session.accelerator.device.type
    if state.device not in ("", device):
        raise CheckpointError(
            f"{checkpoint.folder} was trained on {state.device}, this is {device}: optimizer states differ",
            fix=f"Go on where there is {state.device}, or start a new run",
        )
    train = session.recipe.train
    size, accum = state.micro_batch_size, state.grad_accum_steps
    numbers = {
        "rows a micro batch": (size, train.micro_batch_size, f"Set train.micro_batch_size={size}"),
        "micro batches a step": (accum, train.grad_accum_steps, f"Set train.grad_accum_steps={accum}"),
        "threads": (state.threads, session.threads, f"Set train.threads={state.threads}"),
        "processes": (state.processes, session.accelerator.num_processes, f"Launch {state.processes} processes"),
    }
    for name, (before, now_, fix) in numbers.items():
        if before != now_:
            raise CheckpointError(
                f"{checkpoint.folder} was trained with {before} {name}",
                got=now_,
                allowed=f"{before}, for the same bits",
                fix=fix,
            )


def _changed_tools(session: Session) -> list[str]:
    """Other versions of a library may give other bits: said, not refused."""
    before, now = session.run.manifest().get("tools", {}), records.tool_versions()
    return [
        f"resumed with {name} {now[name]}, begun with {version}: bits may differ from an uninterrupted run"
        for name, version in before.items()
        if now.get(name, version) != version
    ]
