"""Integer blocks: how weights are rounded to them, and that onnxruntime reads them as they are meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from qlora_runtime import Bundle, read_manifest
from rich.console import Console
from safetensors.torch import save_file
from tiny_run import changed_copy
from torch import Tensor

from qlora_kit.export.forms import BITS_4, BITS_8, eight_bit_layers
from qlora_kit.export.grid4 import Blocks, fit_blocks, round_4bit, round_8bit
from qlora_kit.export.linear import DataFile, Linear
from qlora_kit.export.nbits import Rounded8, write_blocks
from qlora_kit.export.parameters import MergedWeights, Rows
from qlora_kit.export.run import export_run
from qlora_kit.model.int4_blocks import as_blocks
from qlora_kit.train.run_folder import RunFolder

SHAPES = [(48, 100), (7, 64), (33, 31)]
Round = Callable[[Tensor], Blocks]


def weight_and_inputs(shape: tuple[int, int] = (48, 100)) -> tuple[Tensor, Tensor]:
    """W [out, in] and inputs [rows, in] whose features go together, as those of a model do."""
    torch.manual_seed(0)
    mix = torch.eye(shape[1]) + 0.3 * torch.randn(shape[1], shape[1])
    return torch.randn(shape) * 0.1, torch.randn(400, shape[1]) @ mix


def output_error(weight: Tensor, blocks: Blocks, x: Tensor) -> float:
    """Share of the output's energy that rounding changes."""
    error = weight - blocks.dequantize(weight.shape[1])
    return float((x @ error.T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_computes_with_the_codes(tmp_path: Path, shape: tuple[int, int], bits: int) -> None:
    weight, x = weight_and_inputs(shape)
    blocks = round_4bit(weight, 32) if bits == 4 else round_8bit(weight, 32)
    linear = Linear(helper.make_node("MatMul", ["x", "m.weight"], ["y"], name="/m"), (Rows("m.weight", 0, shape[0]),))
    with DataFile(tmp_path / "model.onnx_data") as data:
        nodes = write_blocks(linear, blocks, shape[1], data)
    for attribute in nodes[0].attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1  # activations as they are
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", None]) for name in ("x", "y")]
    graph = helper.make_graph([*data.casts, *nodes], "layer", ends[:1], ends[1:], list(data.tensors.values()))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    y = ort.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": x[:5].numpy()})[0]
    np.testing.assert_allclose(y, (x[:5] @ blocks.dequantize(shape[1]).T).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_way_of_rounding_is_better_than_the_one_before(shape: tuple[int, int]) -> None:
    weight, x = weight_and_inputs(shape)
    plain, by_moments = round_4bit(weight, 32), round_4bit(weight, 32, x.T @ x / len(x))
    assert output_error(weight, by_moments, x) < 0.8 * output_error(weight, plain, x) < 0.02
    assert output_error(weight, round_8bit(weight, 32), x) < 0.02 * output_error(weight, by_moments, x)


def test_plain_rounding_is_within_half_a_step() -> None:
    weight, _ = weight_and_inputs()
    for blocks, slack in ((round_4bit(weight, 32), 1.01), (round_8bit(weight, 32), 0.51)):
        steps = blocks.scales.repeat_interleave(32, 1)[:, :100]  # the zero point too is rounded at 4 bit
        assert ((weight - blocks.dequantize(100)).abs() <= slack * steps).all()


def test_unrelated_inputs_leave_each_column_to_itself() -> None:
    """Then GPTQ is the fit of each block, which beats plain rounding in squared error."""
    weight, _ = weight_and_inputs()
    blocks = round_4bit(weight, 32, torch.eye(100))
    scales, zeros = fit_blocks(as_blocks(weight, 32), torch.ones(32))
    torch.testing.assert_close(blocks.scales[:, :3], scales[:, :3])
    assert torch.equal(blocks.zeros[:, :3].float(), zeros[:, :3])  # type: ignore[index]
    errors = [(weight - found.dequantize(100)).norm() for found in (blocks, round_4bit(weight, 32))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("round_", [lambda w: round_4bit(w, 32), lambda w: round_8bit(w, 32)])
def test_odd_blocks(round_: Round) -> None:
    weight = torch.zeros(4, 64)
    weight[1, :32], weight[2, 32:], weight[3, 5] = 0.7, -0.3, 1e-9  # one value, one sign, too small for fp16
    blocks = round_(weight)
    assert torch.isfinite(blocks.scales).all() and torch.equal(blocks.scales, blocks.scales.half().float())
    torch.testing.assert_close(blocks.dequantize(64), weight, rtol=2e-3, atol=1e-8)


def linear_of(name: str, weight: Tensor) -> Linear:
    rows = (Rows(f"{name}.weight", 0, weight.shape[0]),)
    return Linear(helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}/y"], name=name), rows)


def test_eight_bits_go_where_four_cost_most(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(64, 64) for name in ("even", "odd", "lm_head")}
    weights["odd"][:, ::32] *= 20  # one large value in each block, and inputs that hardly know it
    unknown = torch.ones(64)
    unknown[::32] = 1e-4
    moments = {"odd": unknown}
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    linears = [linear_of(name, weight) for name, weight in weights.items()]
    merged = MergedWeights(tmp_path)
    half = eight_bit_layers(linears, merged, moments, budget=(BITS_4 + BITS_8) / 2)
    assert set(half) == {"odd", "lm_head"} and all(isinstance(form, Rounded8) for form in half.values())
    assert set(eight_bit_layers(linears, merged, moments, budget=BITS_4)) == {"lm_head"}
    assert set(eight_bit_layers(linears, merged, moments, budget=BITS_8)) == {"even", "odd", "lm_head"}


def test_a_run_exports_int4(trained_run: Path, tmp_path: Path) -> None:
    run = changed_copy(trained_run, tmp_path / "run", export={"merged": False})
    found: Any = export_run(RunFolder(run), Console(quiet=True), ["int4"])["int4"]
    assert found.perplexity_ratio < 1.25 and read_manifest(run / "bundles" / "int4").profile == "int4"
    graph = onnx.load(run / "bundles" / "int4" / "onnx" / "model.onnx").graph
    bits = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    assert (
        bits.count(8) >= 1
        and bits.count(4) >= 8
        and "Gather" not in {n.op_type for n in graph.node if "embed" in n.name}
    )
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    assert "model.embed_tokens.weight" not in shapes, "the embedding is the head's codes"
    assert Bundle.open(run / "bundles" / "int4").logits([[3, 4, 5]]).shape == (1, 3, 320)
