"""The loss on the held-out rows."""

from __future__ import annotations

import torch

from qlora_kit.train.session import Session


def evaluate_loss(session: Session, batches: int | None = None) -> tuple[float, int]:
    """(mean loss a token, loss tokens) over the held-out rows, or their first `batches` batches.

    Several processes share the batches out among them.
    """
    accelerator, size, rows = session.accelerator, session.recipe.eval.batch_size, session.data.eval
    starts = list(range(0, len(rows), size))[:batches]
    total, count = 0.0, 0
    session.plain.eval()
    try:
        for start in starts[accelerator.process_index :: accelerator.num_processes]:
            batch = session.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            sums, tokens = session.task.row_losses(session.plain, batch)
            total, count = total + sums.double().sum().item(), count + int(tokens.sum())
    finally:
        session.plain.train()
    both = torch.tensor([total, count], dtype=torch.float64, device=accelerator.device)
    total, all_tokens = accelerator.reduce(both).tolist()
    return total / max(1.0, all_tokens), int(all_tokens)
