"""The training loop: read `train`, then `train_step`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.adapters.peft_format import fill_adapter, read_adapter, save_adapter
from qlora_kit.errors import CheckpointError, Interrupted, TrainingError
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import recipe_to_tree
from qlora_kit.train import records
from qlora_kit.train.checkpoint import Checkpoint, TrainState, newest_checkpoint, prune_checkpoints, save_checkpoint
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.loss import count_loss_tokens, row_losses, token_losses
from qlora_kit.train.optim import clip_gradients, lr_at
from qlora_kit.train.progress import Progress
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.samples import write_samples
from qlora_kit.train.session import Session, start_session


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. Loss is the mean over the step's loss tokens, of all processes."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    loss_tokens: int
    seconds: float


def train(recipe: Recipe, run: RunFolder, progress: Progress, resume: bool = False, overwrite: bool = False) -> None:
    """Trains the recipe's adapter in `run`, from the start or from the newest whole checkpoint.

    Everything is loaded before the first file is written: a recipe that cannot start leaves the folder as it was.

    Raises:
        QloraKitError: its children say what went wrong; a run that started is left resumable.
    """
    session = start_session(recipe, run)
    with run.lock() if session.accelerator.is_main_process else nullcontext():
        state = _resume(session) if resume else _begin(session, overwrite)
        progress.start(session, state)
        _start_trackers(session)
        try:
            with _stop_signals() as stop_wanted:
                while state.step < session.total_steps and not state.stopped_early:
                    stats = train_step(session, state.step + 1)
                    _after_step(session, state, stats, progress)
                    if stop_wanted and state.step < session.total_steps:
                        raise _interrupt(session, state)
            _finish(session, state, progress)
        except BaseException:
            if session.accelerator.is_main_process and run.manifest().get("status") == "running":
                run.update_manifest(status="failed", step=state.step)
            raise
        finally:
            progress.stop()
            session.accelerator.end_training()


def train_step(session: Session, step: int) -> StepStats:
    """One optimizer step over grad_accum_steps micro batches, the loss weighted by token over all of them.

    Raises:
        TrainingError: a loss or gradient is not finite; names the step and the rows.
    """
    started = time.perf_counter()
    train, optimizer, scaler = session.recipe.train, session.optimizer, session.scaler
    micro_batches = [session.batches.next_micro_batch() for _ in range(train.grad_accum_steps)]
    batches = [session.collate(rows) for rows in micro_batches]
    counts = torch.tensor(
        [sum(count_loss_tokens(b["labels"]) for b in batches), sum(int(b["attention_mask"].sum()) for b in batches)]
    )
    loss_tokens, tokens = session.accelerator.reduce(counts.to(session.accelerator.device)).tolist()

    loss_sum = torch.zeros((), device=session.accelerator.device)
    for place, batch in enumerate(batches):
        torch.manual_seed(seed_for(session.recipe.run.seed, step, place, session.accelerator.process_index))
        last = place == len(batches) - 1
        with nullcontext() if last else session.accelerator.no_sync(session.model):
            losses, _ = token_losses(session.model, batch)
            # Processes average their gradients; multiplied by their number they sum.
            loss = losses.sum() / loss_tokens * session.accelerator.num_processes
            scaler.scale(loss).backward()
        loss_sum += losses.detach().sum()
    loss_value = session.accelerator.reduce(loss_sum).item() / loss_tokens

    scaler.unscale_(optimizer)
    norm = clip_gradients(list(optimizer.parameters.values()), train.max_grad_norm)
    if not math.isfinite(loss_value) or (not scaler.is_enabled() and not math.isfinite(norm)):
        raise _not_finite(session, step, loss_value, norm, micro_batches)
    lr = lr_at(step, train.lr, train.schedule, train.warmup_steps, session.total_steps)
    optimizer.set_lr(lr)
    scaler.step(optimizer)  # left out, and the scale halved, where fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad()
    return StepStats(loss_value, lr, norm, int(tokens), int(loss_tokens), time.perf_counter() - started)


def evaluate_loss(session: Session, batches: int | None = None) -> tuple[float, int]:
    """(mean loss a token, loss tokens) over the held-out rows, or their first `batches` batches."""
    size, rows = session.recipe.eval.batch_size, session.data.eval
    total, count = 0.0, 0
    session.model.eval()
    try:
        starts = range(0, len(rows), size)
        for start in list(starts)[: batches or len(starts)]:
            batch = session.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            sums, tokens = row_losses(session.model, batch)
            total, count = total + sums.double().sum().item(), count + int(tokens.sum())
    finally:
        session.model.train()
    return total / max(1, count), count


def _start_trackers(session: Session) -> None:
    """TensorBoard and Weights & Biases, through accelerate; the recipe is their configuration."""
    if session.recipe.train.trackers:
        tree = recipe_to_tree(session.recipe)
        flat = {f"{section}.{key}": str(value) for section, part in tree.items() for key, value in part.items()}
        session.accelerator.init_trackers("qlora-kit", config=flat)


def _begin(session: Session, overwrite: bool) -> TrainState:
    state = TrainState(
        micro_batch_size=session.recipe.train.micro_batch_size,
        grad_accum_steps=session.recipe.train.grad_accum_steps,
        threads=session.threads,
        processes=session.accelerator.num_processes,
        data_sha256=session.data.sha256,
    )
    if session.accelerator.is_main_process:
        session.run.begin(session.recipe, overwrite)
        session.tokenizer.save_pretrained(session.run.tokenizer)
        session.run.update_manifest(**records.at_start(session))
    return state


def _resume(session: Session) -> TrainState:
    """Goes on from the newest whole checkpoint; from the start where none was written yet."""
    checkpoint, damaged = newest_checkpoint(session.run.checkpoints)
    if checkpoint is None:
        return _begin(session, overwrite=True)
    state = checkpoint.state
    _check_same_conditions(session, state, checkpoint)
    stored = read_adapter(checkpoint.adapter)
    fill_adapter(session.plain, session.settings, stored.tensors, str(checkpoint.adapter))
    session.optimizer.load_state(checkpoint.optimizer_tensors, checkpoint.optimizer_numbers)
    if state.grad_scaler:
        session.scaler.load_state_dict(state.grad_scaler)
    session.batches.load_state_dict(state.data_position)
    if session.accelerator.is_main_process:
        session.run.drop_metrics_after(state.step)
        manifest = session.run.manifest()
        session.run.update_manifest(status="running", resumes=[*manifest.get("resumes", []), state.step])
        for line in damaged:
            session.run.note(f"resumed from step {state.step}: {line}")
    return state


def _check_same_conditions(session: Session, state: TrainState, checkpoint: Checkpoint) -> None:
    base = session.run.manifest()["base"]["fingerprint"]
    if base != session.source.fingerprint():
        raise CheckpointError(
            f"{checkpoint.folder} was trained on another base model than base.model now holds",
            fix="Put the model's files back, or start a new run",
        )
    if state.data_sha256 != session.data.sha256:
        raise CheckpointError(
            f"{checkpoint.folder} was trained on other data than data.train and data.eval now hold",
            fix="Put the files back, or start a new run",
        )
    now = {"threads": session.threads, "processes": session.accelerator.num_processes}
    for name, value in now.items():
        was = getattr(state, name)
        if was != value:
            raise CheckpointError(
                f"{checkpoint.folder} was trained with {was} {name}",
                got=value,
                allowed=f"{was}, for the same bits",
                fix=f"Set train.threads={was}" if name == "threads" else f"Launch {was} processes",
            )


def _after_step(session: Session, state: TrainState, stats: StepStats, progress: Progress) -> None:
    """Counts, logs, evaluates and saves as the recipe says."""
    train = session.recipe.train
    state.step += 1
    state.tokens_seen += stats.tokens
    state.elapsed_s += stats.seconds
    if state.step % train.log_every == 0 or state.step == session.total_steps:
        _log(session, records.train_record(state, stats), progress)
    improved = False
    if train.eval_every and len(session.data.eval) and (state.step % train.eval_every == 0 or _at_end(session, state)):
        improved = _evaluate(session, state, progress)
    due = train.save_every and state.step % train.save_every == 0
    if due or improved or state.stopped_early or _at_end(session, state):
        save(session, state)
        if session.accelerator.is_main_process:
            session.run.update_manifest(step=state.step)


def _at_end(session: Session, state: TrainState) -> bool:
    return state.step == session.total_steps


def _evaluate(session: Session, state: TrainState, progress: Progress) -> bool:
    loss, tokens = evaluate_loss(session, session.recipe.train.eval_batches)
    if not math.isfinite(loss):
        raise TrainingError(f"step {state.step}: the evaluation loss is not finite", got=loss, fix="Lower train.lr")
    improved = state.best_loss is None or loss < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evals_without_gain = loss, state.step, 0
    else:
        state.evals_without_gain += 1
    _log(session, records.eval_record(state, loss, tokens, improved), progress)
    patience = session.recipe.train.early_stopping_patience
    state.stopped_early = patience is not None and state.evals_without_gain >= patience
    return improved


def save(session: Session, state: TrainState) -> None:
    """Writes a checkpoint of this very moment."""
    state.data_position = session.batches.state_dict()
    state.grad_scaler = session.scaler.state_dict()
    if not session.accelerator.is_main_process:
        return
    tensors, numbers = session.optimizer.state()
    save_checkpoint(
        session.run.checkpoints,
        state,
        lambda folder: save_adapter(session.plain, session.settings, folder, session.recipe.base.model),
        tensors,
        numbers,
    )
    prune_checkpoints(session.run.checkpoints, session.recipe.train.keep_checkpoints, state.best_step)


def _finish(session: Session, state: TrainState, progress: Progress) -> None:
    """Fills adapter/ with the best checkpoint's weights where evaluations ran, else with the last."""
    if not session.accelerator.is_main_process:
        return
    step = state.best_step or state.step
    records.publish_adapter(session, step)
    loss = state.best_loss
    if len(session.data.eval) and step == state.step:
        loss, _ = evaluate_loss(session)
    write_samples(session)
    session.run.update_manifest(**records.at_end(session, state, step, loss))
    progress.finish(session.run.adapter, step, loss)


def _log(session: Session, record: dict[str, Any], progress: Progress) -> None:
    if not session.accelerator.is_main_process:
        return
    session.run.append_metrics(record)
    values = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, float)}
    session.accelerator.log(values, step=record["step"])
    progress.show(record)


def _interrupt(session: Session, state: TrainState) -> Interrupted:
    save(session, state)
    session.run.update_manifest(status="interrupted", step=state.step)
    return Interrupted(
        f"stopped at step {state.step} of {session.total_steps}; a checkpoint is written",
        fix=f"Go on with: qlora-kit train --resume {session.run.path}",
    )


def _not_finite(session: Session, step: int, loss: float, norm: float, micro_batches: list[Any]) -> TrainingError:
    rows = ", ".join(session.data.describe_row(row) for rows in micro_batches for row in rows)
    return TrainingError(
        f"step {step}: loss {loss} and gradient norm {norm} are not finite; rows: {rows}",
        fix="Lower train.lr, set base.compute_dtype=bf16 or fp32, or look at these rows with `qlora-kit data show`",
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the step at hand; a second Ctrl-C ends it at once."""
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
