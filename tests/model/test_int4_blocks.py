"""The layout of MatMulNBits: bit by bit by hand, and as onnxruntime itself computes with it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qlora_kit.model.int4_blocks import (
    BLOCK_SIZES,
    Algorithm,
    Int4Blocks,
    Int4Grid,
    dequantize_int4,
    quantize_int4,
)

SIZES = [(64, 33), (100, 7), (13, 11), (96, 257), (1, 1), (300, 64), (129, 128)]  # in, out
ALGORITHMS: list[Algorithm] = ["rtn", "hqq"]


def some_weight(fan_in: int, fan_out: int) -> Tensor:
    generator = torch.Generator().manual_seed(fan_in * 1000 + fan_out)
    weight = torch.randn(fan_out, fan_in, generator=generator) * 0.05
    weight[0] = weight[0].abs()  # blocks whose zero point is 0
    weight[-1, : fan_in // 2] = 0.0
    return weight


def by_hand(blocks: Int4Blocks, fan_in: int) -> np.ndarray:
    """The weight [out, in] from the bytes, one element after the other."""
    codes, scales, zeros = (tensor.numpy() for tensor in blocks)
    size = 2 * codes.shape[2]
    weight = np.zeros((len(codes), fan_in), np.float32)
    for row, k in np.ndindex(*weight.shape):
        block, at = divmod(k, size)
        code = codes[row, block, at // 2] >> (4 if at % 2 else 0) & 15
        zero = zeros[row, block // 2] >> (4 if block % 2 else 0) & 15
        weight[row, k] = scales[row, block] * np.float32(int(code) - int(zero))
    return weight


def matmul_nbits(x: Tensor, blocks: Int4Blocks, fan_in: int) -> Tensor:
    """x [tokens, in] times the weight, by a graph of onnxruntime's own operator."""
    fan_out, _, half = blocks.codes.shape
    inputs = {"B": blocks.codes, "scales": blocks.scales, "zero_points": blocks.zero_points}
    node = helper.make_node("MatMulNBits", ["A", *inputs], ["Y"], domain="com.microsoft", K=fan_in, N=fan_out, bits=4,
                            block_size=2 * half, accuracy_level=0)  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["tokens", fan_in])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["tokens", fan_out])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"A": x.numpy()})[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnxruntime_computes_with_the_same_weight(
    size: tuple[int, int], block_size: int, algorithm: Algorithm
) -> None:
    blocks = quantize_int4(some_weight(*size), Int4Grid(block_size, algorithm))
    expanded = dequantize_int4(blocks, size[0], torch.float32)
    np.testing.assert_array_equal(expanded.numpy(), by_hand(blocks, size[0]))
    x = torch.randn(3, size[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(matmul_nbits(x, blocks, size[0]), x @ expanded.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_narrow_dtypes_are_rounded_once(size: tuple[int, int], dtype: torch.dtype) -> None:
    blocks = quantize_int4(some_weight(*size), Int4Grid(32, "hqq"))
    narrow = dequantize_int4(blocks, size[0], dtype)
    assert narrow.dtype == dtype and narrow.is_contiguous()
    assert torch.equal(narrow, dequantize_int4(blocks, size[0], torch.float32).to(dtype))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rtn_is_within_a_step_and_keeps_zero(size: tuple[int, int]) -> None:
    weight = some_weight(*size)
    blocks = quantize_int4(weight, Int4Grid(32, "rtn"))
    expanded = dequantize_int4(blocks, size[0], torch.float32)
    steps = blocks.scales.repeat_interleave(32, 1)[:, : size[0]]
    # Half a step of rounding a weight, half a step of rounding the zero point where the range ends.
    assert ((expanded - weight).abs() <= steps * 1.001).all()
    assert (expanded[weight == 0] == 0).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hqq_makes_no_block_worse_and_most_better(block_size: int) -> None:
    weight = some_weight(384, 100)
    powers, squares = {}, {}
    for algorithm in ALGORITHMS:
        blocks = quantize_int4(weight, Int4Grid(block_size, algorithm))
        error = (dequantize_int4(blocks, 384, torch.float32) - weight).abs().view(100, -1, block_size)
        powers[algorithm], squares[algorithm] = error.pow(0.7).sum(2), error.square().sum()
    assert (powers["hqq"] <= powers["rtn"] * 1.0001).all()
    assert (powers["hqq"] < powers["rtn"] * 0.999).float().mean() > 0.8
    assert squares["hqq"] < 0.98 * squares["rtn"]


def test_rows_are_quantized_alike_alone_and_together() -> None:
    """A weight of several pieces, in bf16 and transposed in memory: the same bytes."""
    weight = some_weight(700, 900).bfloat16()
    for algorithm in ALGORITHMS:
        whole = quantize_int4(weight, Int4Grid(64, algorithm))
        turned = quantize_int4(weight.T.contiguous().T, Int4Grid(64, algorithm))
        last = quantize_int4(weight[-2:].float(), Int4Grid(64, algorithm))
        assert all(torch.equal(one, other) for one, other in zip(whole, turned, strict=True))
        assert all(torch.equal(one[-2:], other) for one, other in zip(whole, last, strict=True))
