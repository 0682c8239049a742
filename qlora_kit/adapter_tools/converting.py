"""An adapter in another form: ordinary LoRA, another dtype, a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.adapter_tools.sources import DEFAULTS, Source, as_lora, check_new, write_new
from qlora_kit.adapters.deltas import delta_tensors, layer_ranks, other_tensors, read_deltas, read_places
from qlora_kit.adapters.method import DTYPES, dtype_name
from qlora_kit.adapters.peft_config import unscaled_config
from qlora_kit.errors import AdapterError


def convert(source: Source, target: Path, rank: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Writes the adapter into the new folder `target` as ordinary LoRA, other methods' as `to_lora` says.

    Args:
        rank: cut every delta to it, by singular values; a layer of a smaller rank stays as it is.
        dtype: bf16 or fp32; the adapter's own where left out.

    Returns: `dtype`, and `lost`: layer name to the share of its norm that the cut left out.

    Raises:
        AdapterError: the method has no such form, the rank is not smaller, or `target` is there.
    """
    check_new(target)
    stored = as_lora(source)
    deltas = read_deltas(stored, source.folder)
    dtype = dtype or dtype_name(stored.tensors, (".lora_",))
    config, lost = stored.config, dict.fromkeys(deltas, 0.0)
    if rank is None:
        factors = {key: tensor.to(DTYPES[dtype]) for key, tensor in stored.tensors.items() if ".lora_" in key}
    else:
        most = max(delta.rank for delta in deltas.values())
        if not 1 <= rank <= most:
            raise AdapterError(f"{source.folder}: rank", got=rank, allowed=f"1 to {most}, the adapter's own")
        cut = {name: delta.truncated(min(rank, delta.rank)) for name, delta in deltas.items()}
        lost = {name: share for name, (_, share) in cut.items()}
        smaller = {name: delta for name, (delta, _) in cut.items()}
        places = read_places(stored)
        factors = delta_tensors(smaller, places, DTYPES[dtype])
        config = unscaled_config(layer_ranks(smaller, places), DEFAULTS | config)
    write_new(target, config, factors | other_tensors(stored, source.folder), {})
    return {"folder": str(target), "dtype": dtype, "rank": rank, "lost": lost}
