"""Errors of a step that say which rows, or what to change."""

from __future__ import annotations

from qlora_kit.data.masking import Encoded
from qlora_kit.errors import OutOfMemory, TrainingError
from qlora_kit.train.session import Session


def not_finite(
    session: Session, step: int, loss: float, norm: float, micro_batches: list[list[Encoded]]
) -> TrainingError:
    """Names the rows whose own loss is not finite; all of the step's where no single one is to blame."""
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    alone = [session.task.row_losses(session.plain, session.collate([row]))[0].isfinite().item() for row in rows]
    wrong = [row for row, finite in zip(rows, alone) if not finite]
    if wrong or session.accelerator.num_processes == 1:
        wrong = wrong or rows
        names = ", ".join(session.data.describe_row(row) for row in wrong[:8])
        names += f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    else:
        names = "rows of another process"
    return TrainingError(
        f"step {step}: loss {loss} and gradient norm {norm} are not finite; rows: {names}",
        fix="Lower train.lr, set base.compute_dtype=bf16 or fp32, or look at these rows with `qlora-kit data show`",
    )


def out_of_memory(session: Session, step: int, shortage: str) -> OutOfMemory:
    """What was got, what to change, and how the run goes on where there is more memory."""
    recipe = session.recipe
    train, size = recipe.train, session.micro_batches.at(step + 1)
    ways = []
    if size > 1:  # several processes, or an evaluation
        accum = -(-train.micro_batch_size * train.grad_accum_steps // (size // 2))
        ways.append(f"train.micro_batch_size={size // 2} with train.grad_accum_steps={accum}")
    if not train.gradient_checkpointing:
        ways.append("train.gradient_checkpointing=true")
    elif train.gradient_checkpointing != "offload" and session.accelerator.device.type == "cuda":
        ways.append("train.gradient_checkpointing=offload")
    if recipe.base.quant == "none" and not recipe.adapter.trains_all:
        ways.append("base.quant=nf4")
    ways.append(f"data.max_seq_len below {recipe.data.max_seq_len}")
    if recipe.eval.batch_size > 1:
        ways.append(f"eval.batch_size below {recipe.eval.batch_size}")
    return OutOfMemory(
        f"too little memory on {session.accelerator.device.type} after step {step}, "
        f"with micro batches of {size} row{'s' if size > 1 else ''}: {shortage}",
        fix=f"Start a new run with {', or '.join(ways)} (`qlora-kit plan` tells what fits). "
        f"Or free some memory. {session.run.how_to_resume()}",
    )
