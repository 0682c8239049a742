"""Gradient checkpointing whose kept inputs wait in host memory: on the device lie two of them, however many the layers.

A layer's input is copied to pinned memory by a side stream while the layer computes. In the backward pass the input of
the layer below is on its way back while a layer is recomputed. Plain references, in torch: `checkpoint` alone, and with
`torch.autograd.graph.save_on_cpu`, whose copies stand in the way of the computation.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.kernels.host_memory import host_tensor

ON_DEVICE = 2  # inputs: in the forward pass two that are leaving, in the backward pass one in use and one arriving
PIECE_BYTES = 2**22  # torch rounds pinned memory up to a power of two: pieces of one waste little, and fit every length


class Kept:
    """A tensor whose bytes lie in pieces of host memory, or are on their way there.

    Attributes:
        on_device: the tensor itself, until its memory is needed or after it was fetched.
        copied: the end of its latest copy, to either side; None where copies are done at once.
        before: the one that was kept before it, which the backward pass needs next.
    """

    def __init__(self, store: InputStore, tensor: Tensor, before: Kept | None) -> None:
        self.store, self.shape, self.dtype = store, tensor.shape, tensor.dtype
        self.on_device: Tensor | None = tensor
        self.copied: torch.cuda.Event | None = None
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.pieces: list[Tensor] = []

    def __del__(self) -> None:
        self.store.release(self)


class InputStore:
    """Inputs of a model's layers in host memory, which is reused from step to step.

    Args:
        device: where the model computes. On a CPU all copies are made at once, by the same way.
        pin: whether the host's memory is pinned, without which nothing is copied beside the computation.
    """

    def __init__(self, device: torch.device, pin: bool | None = None) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pin = self.side is not None if pin is None else pin
        self.host_bytes = 0
        self._free: list[Tensor] = []
        self._leaving: deque[weakref.ref[Kept]] = deque()

    def keep(self, tensor: Tensor) -> Kept:
        """Begins to copy a tensor to the host; the one that was kept ON_DEVICE calls ago leaves the device.

        Raises:
            OutOfMemory: the host has no more memory to pin.
        """
        tensor = tensor.detach().contiguous()
        kept = Kept(self, tensor, self._leaving[-1]() if self._leaving else None)
        parts = _bytes_of(tensor).split(PIECE_BYTES)
        for _ in parts:
            kept.pieces.append(self._piece())
        with self._beside(kept):
            for piece, part in zip(kept.pieces, parts, strict=True):
                piece[: len(part)].copy_(part, non_blocking=True)
        self._leaving.append(weakref.ref(kept))
        while len(self._leaving) > ON_DEVICE:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                self._wait(oldest)
                oldest.on_device = None
        return kept

    def bring_back(self, kept: Kept) -> Tensor:
        """The tensor, on the device; the copy of the one before it begins."""
        tensor = self._fetch(kept) if kept.on_device is None else kept.on_device
        self._wait(kept)
        kept.on_device = None
        before = kept.before()
        if before is not None and before.on_device is None:
            self._fetch(before)
        return tensor

    def release(self, kept: Kept) -> None:
        """Takes back the host memory of one that nobody needs any more. The side stream uses it in its own order."""
        if kept.on_device is not None:
            self._wait(kept)
        self._free += kept.pieces

    def _fetch(self, kept: Kept) -> Tensor:
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)  # of the computing stream's memory
        parts = _bytes_of(tensor).split(PIECE_BYTES)
        with self._beside(kept):
            for piece, part in zip(kept.pieces, parts, strict=True):
                part.copy_(piece[: len(part)], non_blocking=True)
        kept.on_device = tensor
        return tensor

    def _wait(self, kept: Kept) -> None:
        """What the computing stream is given from now on comes after the copy: its memory may be read, or freed."""
        if kept.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.copied)

    @contextmanager
    def _beside(self, kept: Kept) -> Iterator[None]:
        """Copies in the side stream, after what the computing stream has been given so far."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield
        kept.copied = self.side.record_event()

    def _piece(self) -> Tensor:
        """uint8 [PIECE_BYTES] of the host."""
        if self._free:
            return self._free.pop()
        piece = host_tensor((PIECE_BYTES,), torch.uint8, self.pin, "set train.gradient_checkpointing=true")
        self.host_bytes += PIECE_BYTES
        return piece


def offloaded(store: InputStore, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """checkpoint(function, *args), which is the plain path, with its first argument kept in `store`.

    Args:
        checkpoint: torch's, not reentrant. What else it keeps (masks, which all layers share) stays where it is.
        function: a layer; takes hidden states [batch, seq, width] first, and writes nothing into them.
    """
    place = args[0].data_ptr()

    def pack(tensor: Tensor) -> Kept | Tensor:
        return store.keep(tensor) if tensor.data_ptr() == place else tensor

    with saved_tensors_hooks(pack, lambda packed: store.bring_back(packed) if isinstance(packed, Kept) else packed):
        return checkpoint(function, *args)


def offload_inputs(model: nn.Module, device: torch.device) -> InputStore:
    """Lets the layers of a transformers model that checkpoints already keep their inputs in host memory, in place."""
    store = InputStore(device)
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(offloaded, store, layer._gradient_checkpointing_func)
    return store


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory, contiguous, as uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)
