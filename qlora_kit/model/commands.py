"""`qlora-kit quantize` and `qlora-kit cache`."""

from __future__ import annotations

import argparse
import datetime
import shutil
from pathlib import Path

from qlora_kit.errors import ModelError


def run_model_action(options: argparse.Namespace) -> None:
    """Does what the verb says, and prints what came of it."""
    {"quantize": _quantize, "cache": _cache}[options.verb](options)


def _quantize(options: argparse.Namespace) -> None:
    from qlora_kit.model.cache import made_as
    from qlora_kit.model.load import DTYPES, load_base
    from qlora_kit.model.quantize import Quantization
    from qlora_kit.model.source import find_base
    from qlora_kit.model.stored import is_stored
    from qlora_kit.model.storing import write_stored

    target, dtype = Path(options.output), DTYPES[options.dtype]
    if target.exists():
        raise ModelError(f"{target} exists", fix="Give another folder, or remove it first")
    source = find_base(options.model, options.revision)
    if is_stored(source.folder):
        raise ModelError(f"{options.model} is quantized already", fix="Give the model that it was made from")
    quant = Quantization(options.quant, not options.no_double_quant, head=options.head_quant)
    how = made_as(source, quant.options(), dtype, "cpu", None, "AutoModelForCausalLM")
    model = load_base(source, quant.kind, quant.double_quant, dtype, head_quant=quant.head)
    written = write_stored(model, source.folder, target, how)
    before = sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    print(f"{target}: {options.quant}, {written / 2**30:.2f} GiB ({before / 2**30:.2f} before)")


def _cache(options: argparse.Namespace) -> None:
    from qlora_kit.model.cache import forget, kept_models
    from qlora_kit.model.source import cache_dir

    if options.action == "clear":
        gone = forget(options.names)
        print(f"removed {len(gone)} from {cache_dir()}: {sum(one.bytes for one in gone) / 2**30:.2f} GiB")
        return
    kept = kept_models()
    for one in kept:
        used = datetime.datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        print(f"{one.folder.name}  {one.kind:9}  {one.bytes / 2**30:7.2f} GiB  used {used}  {one.about}")
    total, free = sum(one.bytes for one in kept), shutil.disk_usage(_existing(cache_dir())).free
    print(f"{cache_dir()}: {total / 2**30:.2f} GiB in {len(kept)} models; {free / 2**30:.1f} GiB free on the disk")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
