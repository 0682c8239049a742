"""Quantized linear layers: the one place that owns codes, statistics and their layout.

bitsandbytes quantizes and dequantizes all kinds but int4 (model/int4_blocks.py); its modules' `forward` is never
called. On CPUs with AVX512-BF16 the
first evaluation forward of `Linear4bit` repacks the weight in place and rounds its statistics, after which
neither training nor saving is right. So a loaded `Linear4bit` or `Linear8bitLt` becomes a `QuantizedLinear`,
whose buffers nothing ever writes to.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from qlora_kit.errors import ModelError
from qlora_kit.kernels.frozen_linear import frozen_linear
from qlora_kit.kernels.quantize_4bit import quantize_4bit
from qlora_kit.model.int4_blocks import Int4Blocks, dequantize_int4
from qlora_kit.model.int4_loading import PendingInt4


def _import_bitsandbytes() -> Any:
    """bitsandbytes without the package `kernels`, through which its CPU backend would fetch a binary from a hub."""
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    absent = object()
    hidden: Any = sys.modules.get("kernels", absent)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.setLevel(logging.ERROR)  # or it warns that `kernels` is missing
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not absent:
            sys.modules["kernels"] = hidden
    return bitsandbytes


bnb = _import_bitsandbytes()


def _quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    codes, absmax = quantize_4bit(weight, blocksize, bnb.functional.get_4bit_type(quant_type, "cpu"))
    return codes.view(-1).view(quant_storage).unsqueeze(1), absmax


if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU"):
    torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu", _quantize_4bit)  # the same bytes, sooner


class QuantizedLinear(nn.Module):
    """A frozen linear layer held as codes: y = x Wᵀ + b, W expanded for the moment of use.

    Buffers (4 bit): codes uint8 [out*in/2], absmax (uint8 with double quantization, else float32) [blocks],
    code float32 [16], and nested_absmax float32, nested_code float32 [256], offset float32 [] where nested.
    Buffers (8 bit): codes int8 [out, in], absmax float32 [out].
    Buffers (int4): codes, scales and zero_points of `Int4Blocks`. Weight-only: activations are never rounded.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, quant: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quant = in_features, out_features, quant
        self.block_size = self.nested_block_size = 0
        self.kept: Tensor | None = None  # the expanded weight, inside `expanded`
        self.register_parameter("bias", bias)

    @classmethod
    def from_bitsandbytes(cls, layer: Any) -> QuantizedLinear:
        """Takes over the codes and statistics of a `Linear4bit` or `Linear8bitLt` that was never run.

        Raises:
            ModelError: the layer was run, and so repacked, or was never quantized.
        """
        weight = layer.weight
        if isinstance(layer, bnb.nn.Linear4bit):
            state = weight.quant_state
            if state is None:
                raise ModelError("a 4-bit layer was never quantized", fix="Load the model onto a device")
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError("a 4-bit layer was repacked by bitsandbytes' own forward", fix="Load the model again")
            quantized = cls(layer.in_features, layer.out_features, state.quant_type, layer.bias)
            quantized.block_size = state.blocksize
            tensors = {"codes": weight.data, "absmax": state.absmax, "code": state.code}
            if state.nested:
                quantized.nested_block_size = state.state2.blocksize
                tensors |= {
                    "nested_absmax": state.state2.absmax,
                    "nested_code": state.state2.code,
                    "offset": state.offset,
                }
        else:
            if weight.SCB is None:
                raise ModelError("an 8-bit layer was never quantized or was run", fix="Load the model again")
            quantized = cls(layer.in_features, layer.out_features, "int8", layer.bias)
            tensors = {"codes": weight.data, "absmax": weight.SCB}
        for name, tensor in tensors.items():
            quantized.register_buffer(name, tensor.detach())
        return quantized

    @classmethod
    def from_int4(cls, blocks: Int4Blocks, in_features: int, bias: nn.Parameter | None) -> QuantizedLinear:
        """A layer of the blocks of a weight [out, in_features]."""
        quantized = cls(in_features, len(blocks.codes), "int4", bias)
        quantized.block_size = 2 * blocks.codes.shape[2]
        for name, tensor in blocks._asdict().items():
            quantized.register_buffer(name, tensor)
        return quantized

    @property
    def int4_blocks(self) -> Int4Blocks:
        """The codes of an int4 layer as MatMulNBits takes them."""
        return Int4Blocks(self.codes, self.scales, self.zero_points)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], expanded in fp32 and cast once to `dtype`."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        if self.quant == "int4":
            return dequantize_int4(self.int4_blocks, self.in_features, dtype)
        functional = bnb.functional
        if self.quant == "int8":
            return functional.int8_vectorwise_dequant(self.codes, self.absmax).to(dtype)
        nested = self._nested_state() if self.nested_block_size else None
        size, uneven = self.out_features * self.in_features, self.in_features % self.block_size
        # Rows that share blocks are asked for as one row: bitsandbytes' fast CPU path begins a block with each row,
        # which is wrong (0.50.2), and it would compile a path for each shape whose rows share bytes.
        shape = (size + size % 2,) if uneven else (self.out_features, self.in_features)
        state = functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size(shape),
            code=self.code,
            blocksize=self.block_size,
            quant_type=self.quant,
            dtype=dtype,
            offset=self.offset if nested else None,
            state2=nested,
        )
        weight = functional.dequantize_4bit(self.codes, state)
        return weight.reshape(-1)[:size].view(self.out_features, self.in_features) if uneven else weight

    def expanded_absmax(self) -> Tensor:
        """What the codes of each block are multiplied by, float32 [blocks]; of 4-bit layers."""
        if not self.nested_block_size:
            return self.absmax
        return bnb.functional.dequantize_blockwise(self.absmax, self._nested_state()) + self.offset

    def _nested_state(self) -> Any:
        return bnb.functional.QuantState(
            absmax=self.nested_absmax,
            code=self.nested_code,
            blocksize=self.nested_block_size,
            dtype=torch.float32,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        return frozen_linear(x, self.dequantize, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Codes and statistics follow the module to a device, never to another dtype: `model.half()` spares them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def stored_bytes(self) -> int:
        """Bytes of codes and statistics."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, quant={self.quant}, bias={self.bias is not None}"


def own_quantized_layers(model: nn.Module) -> None:
    """Replaces every layer that was loaded quantized by a `QuantizedLinear`, in place."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, PendingInt4)
    layers: list[tuple[str, Any]] = [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        if isinstance(layer, PendingInt4) and layer.blocks is not None:
            own = QuantizedLinear.from_int4(layer.blocks, layer.in_features, layer.bias)
        else:
            own = QuantizedLinear.from_bitsandbytes(layer)
        setattr(model.get_submodule(parent), child, own)
    _forget_quantizer(model)


def _forget_quantizer(model: Any) -> None:
    """Removes transformers' marks of a quantized model, which forbid casting and saving."""
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        model.__dict__.pop(mark, None)
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(mark, None)


def _free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@contextmanager
def expanded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keeps every expanded weight for the time of the block: the same bits, without the work at each token.

    Where they would take more than half of the memory that is free, they are expanded at each use as ever.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    needed = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    if layers and needed > _free_bytes(layers[0].codes.device) // 2:
        layers = []
    before = [layer.kept for layer in layers]
    try:
        for layer in layers:
            layer.kept = layer.dequantize(dtype)
        yield
    finally:
        for layer, kept in zip(layers, before):
            layer.kept = kept
