"""The training loop: read `train`, then `train_step`."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.masking import Encoded
from qlora_kit.errors import Interrupted, TrainingError
from qlora_kit.recipe import Recipe
from qlora_kit.train import records
from qlora_kit.train.checkpoint import TrainState
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.evaluation import evaluate_loss
from qlora_kit.train.failures import not_finite, out_of_memory
from qlora_kit.train.growth import resize_adapter
from qlora_kit.train.optim import clip_factor, gradient_norm, lr_at
from qlora_kit.train.peak import PeakWatch
from qlora_kit.train.progress import Progress, QuietProgress
from qlora_kit.train.resume import begin, resume_from_checkpoint
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.samples import write_samples
from qlora_kit.train.saving import publish, save
from qlora_kit.train.session import Session, start_session
from qlora_kit.train.signals import StopSignals, stop_signals
from qlora_kit.train.smaller_batches import in_less_memory, probe_longest

Rows = list[Encoded]
Batch = dict[str, Tensor]
LOWEST_LOSS_SCALE = 2.0**-10  # fp16 gradients that overflow even here are not finite for another reason


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. Loss is the mean over the step's loss tokens, of all processes."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    loss_tokens: int
    seconds: float
    loss_scale: float | None
    """None unless base.compute_dtype is fp16."""
    skipped: bool
    """fp16 gradients overflowed: no weight was changed, and the loss scale is halved."""


def train(
    recipe: Recipe, run: RunFolder, progress: Progress, resume: bool = False, planned_bytes: int | None = None
) -> None:
    """Trains the recipe's adapter in `run`, from the start or from the newest whole checkpoint.

    Everything is loaded before the first file is written: a recipe that cannot start leaves the folder as it was.

    Args:
        planned_bytes: what the plan says it takes, to be set against what it took.

    Raises:
        QloraKitError: its children say what went wrong; a run that started is left resumable.
    """
    with run.lock(), PeakWatch(planned_bytes) as watch:
        if not resume:
            run.check_new()
        else:
            run.check_same_recipe(recipe)
            if records.is_finished(run):
                progress.say(f"{run.path} is finished: nothing is left to do")
                return
        session = start_session(recipe, run, watch, resume)
        progress = progress if session.accelerator.is_main_process else QuietProgress()
        state = resume_from_checkpoint(session) if resume else begin(session)
        try:
            session.ask_teacher()
            session.say = progress.say
            progress.start(session, state)
            session.start_trackers()
            with stop_signals() as signals:
                _all_steps(session, state, progress, signals)
                signals.at_once = True  # all steps are done: what follows can be done again
                _finish(session, state, progress)
        except KeyboardInterrupt:
            records.leave(session, state, "interrupted")
            raise Interrupted("stopped at once", fix=run.how_to_resume()) from None
        except torch.OutOfMemoryError as error:
            records.leave(session, state, "failed")
            raise out_of_memory(session, state.step, str(error)) from error
        except BaseException as error:
            records.leave(session, state, "interrupted" if isinstance(error, Interrupted) else "failed")
            raise
        finally:
            progress.stop()
            session.end()


def _all_steps(session: Session, state: TrainState, progress: Progress, signals: StopSignals) -> None:
    probe_longest(session, state.step + 1)
    while state.step < session.total_steps and not state.stopped_early:
        stats = train_step(session, state.step + 1)
        _after_step(session, state, stats, progress)
        if state.step < session.total_steps and _stop_wanted(session, signals):
            raise _interrupted(session, state)


def train_step(session: Session, step: int) -> StepStats:
    """One optimizer step over grad_accum_steps micro batches, the loss weighted by token over all of them.

    Raises:
        TrainingError: a loss or gradient is not finite; names the step and the rows.
        OutOfMemory: not even single rows fit.
    """
    started = time.perf_counter()
    train, optimizer, scaler = session.recipe.train, session.optimizer, session.scaler
    parameters = list(optimizer.parameters.values())
    rows = [row for _ in range(train.grad_accum_steps) for row in session.batches.next_micro_batch()]
    loss, tokens, loss_tokens = in_less_memory(session, step, lambda: _gradients(session, step, rows))

    scale = scaler.factor
    scaler.unscale(parameters)
    norm = gradient_norm(parameters)
    overflow = not math.isfinite(norm)
    if not math.isfinite(loss) or (overflow and (scale is None or scale < LOWEST_LOSS_SCALE)):
        raise not_finite(session, step, loss, norm, [rows])
    lr = lr_at(step, train.lr, train.schedule, train.warmup_steps, session.total_steps)
    optimizer.set_lr(lr)
    if not overflow:
        clip = clip_factor(norm, train.max_grad_norm)
        optimizer.step(clip)
        session.method.after_step(session.plain, step, session.total_steps, lr, clip)
    resize_adapter(session, step)
    scaler.update(overflow)
    optimizer.zero_grad()
    return StepStats(loss, lr, norm, tokens, loss_tokens, time.perf_counter() - started, scale, overflow)


def _gradients(session: Session, step: int, rows: Rows) -> tuple[float, int, int]:
    """Adds up the gradients of a step's rows. Returns (mean loss a token, tokens, losses that count)."""
    groups = session.micro_batches.groups(rows, step)
    batches = [session.collate(group) for group in groups]
    tokens, loss_tokens = _count_tokens(session, batches)
    return _forward_backward(session, step, groups, batches, loss_tokens), tokens, loss_tokens


def _count_tokens(session: Session, batches: list[Batch]) -> tuple[int, int]:
    """(tokens, losses that count) of a step, over all processes."""
    tokens = sum(session.task.size(batch) for batch in batches)
    loss_tokens = sum(session.task.count(batch) for batch in batches)
    counts = torch.tensor([tokens, loss_tokens], device=session.accelerator.device)
    tokens, loss_tokens = session.accelerator.reduce(counts).tolist()
    return tokens, loss_tokens


def _forward_backward(session: Session, step: int, rows: list[Rows], batches: list[Batch], loss_tokens: int) -> float:
    """Adds up the step's gradients. Returns the mean loss a token, over all processes."""
    accelerator = session.accelerator
    loss_sum = torch.zeros((), device=accelerator.device)
    for place, (group, batch) in enumerate(zip(rows, batches)):
        torch.manual_seed(seed_for(session.recipe.run.seed, step, place, accelerator.process_index))
        last = place == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(session.model):
            losses = session.losses(batch, group)
            session.memory.check()
            # Processes average their gradients; multiplied by their number they sum.
            loss = losses.sum() / loss_tokens * accelerator.num_processes
            if last and (penalty := session.method.penalty(session.plain)) is not None:
                loss = loss + penalty
            session.scaler.scaled(loss).backward()
            session.memory.check()
        loss_sum += losses.detach().sum()
    return accelerator.reduce(loss_sum).item() / loss_tokens


def _after_step(session: Session, state: TrainState, stats: StepStats, progress: Progress) -> None:
    """Counts, logs, evaluates and saves as the recipe says; at the last step all of them."""
    train = session.recipe.train
    state.step += 1
    state.tokens_seen += stats.tokens
    state.step_s += stats.seconds
    state.elapsed_s += session.lap()
    at_end = state.step == session.total_steps
    if at_end or state.step % train.log_every == 0:
        _log(session, records.train_record(state, stats), progress)
    improved = False
    if at_end or (train.eval_every and state.step % train.eval_every == 0):
        improved = _evaluate(session, state, progress)
        patience = train.early_stopping_patience
        state.stopped_early = not at_end and patience is not None and state.evals_without_gain >= patience
    if at_end or improved or state.stopped_early or (train.save_every and state.step % train.save_every == 0):
        save(session, state)


def _evaluate(session: Session, state: TrainState, progress: Progress) -> bool:
    """Whether the loss on the held-out rows is the lowest so far."""
    loss, tokens = evaluate_loss(session, session.recipe.train.eval_batches)
    if not math.isfinite(loss):
        raise TrainingError(f"step {state.step}: the evaluation loss is not finite", got=loss, fix="Lower train.lr")
    may_ship = state.step >= session.method.ships_from(session.total_steps)
    improved = may_ship and (state.best_loss is None or loss < state.best_loss)
    if improved:
        state.best_loss, state.best_step, state.evals_without_gain = loss, state.step, 0
    elif may_ship:
        state.evals_without_gain += 1
    _log(session, records.eval_record(state, loss, tokens, improved, session.task.perplexity), progress)
    return improved


def _finish(session: Session, state: TrainState, progress: Progress) -> None:
    """Publishes the best checkpoint's adapter, scores it on all held-out rows and lets it answer a few."""
    step = publish(session, state)
    known = state.best_loss if step == state.best_step and session.recipe.train.eval_batches is None else None
    loss = evaluate_loss(session)[0] if known is None else known
    if session.accelerator.is_main_process:
        session.run.update_manifest(adapter=records.published(session.run, step))  # from here on it can be exported
        write_samples(session)
        state.elapsed_s += session.lap()
        session.run.update_manifest(**records.at_end(session, state, loss))
        if compared := session.watch.compared():
            progress.say(compared)
        progress.finish(session.run.adapter, step, loss)
    session.accelerator.wait_for_everyone()


def _log(session: Session, record: dict[str, Any], progress: Progress) -> None:
    if not session.accelerator.is_main_process:
        return
    session.run.append_metrics(record)
    values = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, float)}
    session.accelerator.log(values, step=record["step"])
    progress.show(record)


def _stop_wanted(session: Session, signals: StopSignals) -> bool:
    """A signal may reach one process a step before another: they stop together."""
    wanted = torch.tensor(int(signals.wanted), device=session.accelerator.device)
    return session.accelerator.reduce(wanted).item() > 0


def _interrupted(session: Session, state: TrainState) -> Interrupted:
    save(session, state)
    return Interrupted(
        f"stopped at step {state.step} of {session.total_steps}; a checkpoint is written",
        fix=session.run.how_to_resume(),
    )
