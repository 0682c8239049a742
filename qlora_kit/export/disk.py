"""The disk that an export takes, counted before it writes anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from rich.console import Console
from transformers import PreTrainedModel

from qlora_kit.adapters.layer import linear_shape
from qlora_kit.errors import ExportError
from qlora_kit.export.calibration import linear_layers
from qlora_kit.export.forms import BITS_8, BUDGET, forms_of
from qlora_kit.export.nbits import BLOCK_SIZE
from qlora_kit.export.rows import ProofRow
from qlora_kit.train.run_folder import RunFolder

LINEAR_BITS = {"fp32": 32, "int8": BITS_8, "int4": BUDGET, "nf4": 4.5, "int4_exact": 5.2, "int4_fast": 5.2}
"""Bits of a linear layer's weight. The adapter beside codes is left out."""
SAID_FROM = 1 << 30
"""Less is not worth a word."""


def needed_bytes(model: PreTrainedModel, profiles: Sequence[str], rows: Sequence[ProofRow]) -> int:
    """What the export of a model takes on disk at most: merged folder, bundles, the reference's logits.

    Args:
        rows: of the proof, of which all logits are kept until the end; none where the task is not to generate.
    """
    shapes: list[tuple[int, int]] = [linear_shape(layer) for layer in linear_layers(model).values()]
    linear, config = sum(width * out for width, out in shapes), model.config
    vocab = getattr(config, "vocab_size", 0)
    width = getattr(config, "hidden_size", 0)
    others = 2 * vocab * width  # embedding and head; the rest is small
    codes = rows and width % BLOCK_SIZE == 0
    bits = {name: BITS_8 if codes and forms_of(name, {}, {}).embeds_codes else 32 for name in profiles}
    bundles = sum(linear * LINEAR_BITS[name] + others * bits[name] for name in profiles) / 8
    logits = sum(len(row.input_ids) for row, _ in rows) * vocab * 4
    return int((linear + others) * 4 + bundles + logits)


def require_room(run: RunFolder, needed: int, console: Console) -> None:
    """Says what an export of so many bytes takes, where that is much.

    Raises:
        ExportError: the disk has not that much.
    """
    free = shutil.disk_usage(run.path).free
    words = f"{needed / 2**30:.1f} GiB of disk in {run.path}"
    if needed >= SAID_FROM:
        console.print(f"takes up to {words}, {free / 2**30:.1f} are free", highlight=False)
    if needed > free:
        raise ExportError(
            f"the export may take {words}",
            got=f"{free / 2**30:.1f} GiB free",
            fix="Free some space, export fewer profiles at a time, or lower export.verify_prompts",
        )
