"""The disk that an export takes, counted before it writes anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from rich.console import Console
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import output_head
from qlora_kit.adapters.layer import AdaptedLayer, linear_shape
from qlora_kit.errors import ExportError
from qlora_kit.export.calibration import linear_layers
from qlora_kit.export.rows import ProofRow
from qlora_kit.plan.export import export_parts
from qlora_kit.train.run_folder import RunFolder

SAID_FROM = 1 << 30
"""Less is not worth a word."""


def needed_bytes(model: PreTrainedModel, profiles: Sequence[str], rows: Sequence[ProofRow]) -> int:
    """What the export of a model takes on disk at most: merged folder, bundles, the reference's logits.

    Args:
        rows: of the proof, of which all logits are kept until the end; none where the task is not to generate.
    """
    head, config = output_head(model), model.config
    layers = [layer for layer in linear_layers(model).values() if layer is not head]
    linear = sum(width * out for width, out in map(linear_shape, layers))
    adapter = sum(
        parameter.numel()
        for layer in layers
        if isinstance(layer, AdaptedLayer)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    )
    vocab, width = (getattr(config, name, 0) for name in ("vocab_size", "hidden_size"))
    tokens = sum(len(row.input_ids) for row, _ in rows)
    parts = export_parts(linear, vocab, width, adapter, profiles, tokens, may_code=bool(rows))
    return sum(part.bytes for part in parts)


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
