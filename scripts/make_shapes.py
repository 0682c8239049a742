"""Writes a model folder of a published model's exact shape with random weights, sharded as a real checkpoint is.

    python scripts/make_shapes.py llama-3.1-8b FOLDER [--layers 2] [--tokenizer MODEL_FOLDER]

Weights are bf16, made and written one tensor at a time: memory stays below one shard. The shapes are in shapes.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).with_name("shapes.json")
SHARD_BYTES = 2 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(shapes()))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="only so many of its layers (default: all)")
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer's files from this model folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--zeros-from", type=int, help="layers from this one on are zeros that take no disk: for a look at memory alone"
    )
    options = parser.parse_args()
    config = shapes()[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    written = write_shape(config, options.folder, options.seed, zeros_from=options.zeros_from)
    if options.tokenizer:
        for file in options.tokenizer.glob("*token*"):
            shutil.copy(file, options.folder)
    print(f"{options.folder}: {written / 2**30:.2f} GiB")


def shapes() -> dict[str, dict[str, Any]]:
    """Name to config.json of each published model."""
    found: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text(encoding="utf-8"))
    return found


def write_shape(
    config: dict[str, Any], folder: Path, seed: int = 0, shard: int = SHARD_BYTES, zeros_from: int | None = None
) -> int:
    """Writes config.json, shards of at most `shard` bytes (or one tensor) and their index. Returns the weights' bytes.

    Layers from `zeros_from` on are holes in the files, which read as zeros.

    Exits with a message where the disk has no room for them.
    """
    sizes = parameter_shapes(config)
    total = sum(_bytes(shape) for shape in sizes.values())
    holes = {name for name in sizes if zeros_from is not None and _layer(name) >= zeros_from}
    on_disk = total - sum(_bytes(sizes[name]) for name in holes)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < on_disk + 2**30:
        sys.exit(f"{folder} has {free / 2**30:.1f} GiB free; {on_disk / 2**30:.1f} GiB and one more are needed")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = _split(sizes, shard)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, (file, part) in enumerate(zip(files, shards)):
        _write_shard(folder / file, part, holes, seed + number)
    weight_map = {key: file for file, part in zip(files, shards) for key in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a checkpoint of this configuration holds, in the model's order."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one once


def _bytes(shape: tuple[int, ...]) -> int:
    size = 2
    for length in shape:
        size *= length
    return size


def _split(sizes: dict[str, tuple[int, ...]], limit: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in sizes.items():
        if filled and filled + _bytes(shape) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += _bytes(shape)
    return shards


def _layer(name: str) -> int:
    """The layer that a tensor belongs to, -1 for none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _write_shard(path: Path, part: dict[str, tuple[int, ...]], holes: set[str], seed: int) -> None:
    """A safetensors file: 8 bytes of length, the header, the tensors one after the other."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in part.items():
        start, end = end, end + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in part.items():
            if name in holes:
                file.seek(_bytes(shape), 1)
                continue
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            if "norm" in name:
                tensor.fill_(1)
            else:
                tensor.normal_(0, 0.02, generator=generator)
            file.write(tensor.view(torch.uint8).numpy().data)
        file.truncate()


if __name__ == "__main__":
    main()
