"""safetensors files written one tensor at a time, each read back from disk from then on: a model larger than memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SHARD_BYTES = 2 << 30
HEADER_BYTES = 1 << 20
"""Room for what a file says of its tensors, about 150 bytes each, before they are known. JSON may end in blanks."""


KINDS = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


class WeightFiles:
    """The weights of a Hugging Face folder: model.safetensors, or several of them and their index.

    Args:
        shard_bytes: a file is full with so many.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._files: list[str] = []
        self._told: dict[str, dict[str, Any]] = {}  # of the file that is open: name to its place
        self._owner: dict[str, str] = {}
        self._total = 0
        self._file: BinaryIO | None = None

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """Writes `tensor`, floats in float32; returns it as it lies on disk. Changes to that stay in memory.

        Raises:
            OSError: the disk is full.
        """
        own = tensor.detach().float() if tensor.is_floating_point() else tensor
        array = own.contiguous().cpu().numpy()
        file = self._opened()
        start = file.tell()
        array.tofile(file)
        file.flush()
        self._told[name] = {"dtype": KINDS[own.dtype], "shape": list(array.shape), "data_offsets": [start, file.tell()]}
        self._owner[name] = self._files[-1]
        self._total += array.nbytes
        path = self.folder / self._files[-1]
        mapped = np.memmap(path, array.dtype, "c", start, array.shape) if array.size else array
        if file.tell() - HEADER_BYTES >= self.shard_bytes or len(self._told) >= HEADER_BYTES // 512:
            self._finish()
        return torch.from_numpy(np.asarray(mapped))

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._files.append(f"part-{len(self._files) + 1}.safetensors")
            self._file = (self.folder / self._files[-1]).open("wb")
            self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _finish(self) -> None:
        """Writes what the open file holds, before its tensors."""
        if self._file is None:
            return
        told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, place in self._told.items():
            told[name] = place | {"data_offsets": [offset - HEADER_BYTES for offset in place["data_offsets"]]}
        header = json.dumps(told).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()
        self._file, self._told = None, {}

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the files, and gives them the names that are usual: with an index where they are several."""
        self._finish()
        count = len(self._files)
        named = {
            old: f"model-{k:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            for k, old in enumerate(self._files, 1)
        }
        for old, new in named.items():
            (self.folder / old).rename(self.folder / new)
        if count > 1:
            owners = {name: named[old] for name, old in self._owner.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": owners}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
