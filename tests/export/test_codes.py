"""The profiles nf4, int4_exact and int4_fast: the training base's own codes in the bundle, the adapter beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from qlora_runtime import Bundle, read_manifest
from rich.console import Console
from tiny_models import save_tiny_model
from tiny_run import changed_copy, train, write_recipe
from torch import nn

from qlora_kit.adapters.adalora import AdaLoraLinear
from qlora_kit.adapters.bottleneck import BottleneckLinear
from qlora_kit.adapters.dora import DoraLinear
from qlora_kit.adapters.layer import AdaptedLinear
from qlora_kit.adapters.lora import LoraLinear
from qlora_kit.adapters.neighbour_settings import BottleneckSettings
from qlora_kit.adapters.pruned_settings import AdaLoraSettings, SoraSettings
from qlora_kit.adapters.qa_lora import QaLoraLinear
from qlora_kit.adapters.settings import DoraSettings, LoraSettings, QaLoraSettings
from qlora_kit.adapters.sora import SoraLinear
from qlora_kit.errors import AdapterError, ExportError
from qlora_kit.export.codes import Coded, CodedLayer, coded_layers, same_codes
from qlora_kit.export.linear import DataFile, Linear
from qlora_kit.export.parameters import MergedWeights, Rows
from qlora_kit.export.run import export_run
from qlora_kit.model.load import to_reference
from qlora_kit.model.quantize import Quantization
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)
LAYERS: dict[str, tuple[type[LoraLinear], Any]] = {
    "lora": (LoraLinear, LoraSettings(rank=3, alpha=5.0)),
    "rslora": (LoraLinear, LoraSettings(rank=3, use_rslora=True)),
    "dora": (DoraLinear, DoraSettings(rank=3)),
    "adalora": (AdaLoraLinear, AdaLoraSettings(rank=3)),
    "sora": (SoraLinear, SoraSettings(rank=3)),
    "qa_lora": (QaLoraLinear, QaLoraSettings(rank=3, group_size=64)),
}


def adapted(kind: str, quant: str = "nf4", double_quant: bool = True, shape: tuple[int, int] = (48, 100)) -> LoraLinear:
    """A layer with an adapter whose every number counts."""
    torch.manual_seed(0)
    base = Quantization(quant, double_quant).quantize(torch.randn(shape) * 0.1, None)
    made, settings = LAYERS[kind]
    layer = made(base, settings)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return layer.eval()


def run_layers(folder: Path, layers: dict[str, CodedLayer], rows: list[Rows], x: np.ndarray) -> np.ndarray:
    """What onnxruntime makes of x [1, n, in] with the layers' rows written as one product."""
    import onnxruntime as ort

    linear = Linear(helper.make_node("MatMul", ["x", "m.weight"], ["y"], name="/m"), tuple(rows))
    with DataFile(folder / "model.onnx_data") as data:
        nodes = Coded(layers).write(linear, MergedWeights(folder), data)
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "n", None]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], list(data.tensors.values()))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    y: np.ndarray = ort.InferenceSession(str(folder / "model.onnx")).run(None, {"x": x})[0]
    return y


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("quant", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int4", False)])
def test_a_layer_computes_what_training_computed(tmp_path: Path, kind: str, quant: str, double_quant: bool) -> None:
    if kind == "qa_lora" and quant != "int4":
        pytest.skip("qa_lora is for int4 bases")
    layer = adapted(kind, quant, double_quant)
    x = torch.randn(1, 7, 100)
    coded = coded_layers(nn.ModuleDict({"m": layer}))
    y = run_layers(tmp_path, coded, [Rows("m.weight", 0, 48)], x.numpy())
    with torch.no_grad():
        expected = layer(x).numpy()
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max()
    assert same_codes(tmp_path / "model.onnx", coded) == 1
    codes = bytearray((tmp_path / "model.onnx_data").read_bytes())
    codes[5] ^= 16
    (tmp_path / "model.onnx_data").write_bytes(bytes(codes))
    assert same_codes(tmp_path / "model.onnx", coded) is None


def test_rows_of_a_layer_have_its_codes(tmp_path: Path) -> None:
    layer = adapted("dora", shape=(32, 100))
    coded = CodedLayer(layer.base_layer, layer.branch())  # type: ignore[arg-type]
    x = torch.randn(1, 3, 100)
    y = run_layers(tmp_path, {"m": coded}, [Rows("m.weight", 16, 16)], x.numpy())  # 1600 codes lie before these
    with torch.no_grad():
        np.testing.assert_allclose(y, layer(x)[..., 16:].numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ExportError, match=r"rows that begin at 1 of a layer begin inside a block of 64 codes"):
        coded.stored(1, 8)


@pytest.mark.parametrize(("kind", "in_features"), [("lora", 100), ("dora", 100), ("qa_lora", 128), ("qa_lora", 100)])
def test_layers_of_one_input_are_one_product(tmp_path: Path, kind: str, in_features: int) -> None:
    """The third of them has no adapter; of qa_lora the input is pooled where its groups are full."""
    first, second, third = (adapted(kind, "int4", False, (out, in_features)) for out in (48, 16, 24))
    layers = {"q": first, "k": second, "v": third.base_layer}
    coded, x = coded_layers(nn.ModuleDict(layers)), torch.randn(1, 5, in_features)
    rows = [Rows(f"{name}.weight", 0, layer.out_features) for name, layer in layers.items()]
    y = run_layers(tmp_path, coded, rows, x.numpy())
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers.values()], dim=-1).numpy()
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max()
    assert same_codes(tmp_path / "model.onnx", coded) == 3
    kinds = [made.op_type for made in onnx.load(tmp_path / "model.onnx").graph.node]
    pools = ["Reshape", "ReduceSum"] if (kind, in_features) == ("qa_lora", 128) else []
    assert kinds == ["MatMulNBits", *pools, "MatMul", "MatMul", "Add", *(["Mul"] if kind == "dora" else [])]


def test_only_low_rank_products_have_a_branch() -> None:
    base = Quantization("nf4").quantize(torch.randn(64, 64), None)
    bottleneck: AdaptedLinear = BottleneckLinear(base, BottleneckSettings())
    with pytest.raises(AdapterError, match=r"BottleneckLinear adds no low-rank product.*Export a merged profile"):
        coded_layers(nn.ModuleDict({"m": bottleneck}))


def test_codes_of_the_training_base_ship(trained_run: Path, tmp_path: Path) -> None:
    run = changed_copy(trained_run, tmp_path / "run", export={"merged": False})
    found: Any = export_run(RunFolder(run), QUIET, ["nf4"])["nf4"]
    assert found.identical_codes == 14 and found.max_logit < 1e-4 and found.top1_agreement == 1
    manifest = read_manifest(run / "bundles" / "nf4")
    assert manifest.profile == "nf4" and manifest.verification is not None
    assert manifest.verification.distances["identical_codes"] == 14
    kinds = [node.op_type for node in onnx.load(run / "bundles" / "nf4" / "onnx" / "model.onnx").graph.node]
    assert kinds.count("MatMulBnb4") == 14 and kinds.count("MatMul") == 2 * 14 + 1
    reference, ids = to_reference(load_tuned(RunFolder(run))), torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = Bundle.open(run / "bundles" / "nf4").logits(ids.numpy())
        assert np.abs(logits - reference(ids).logits.numpy()).max() < 1e-4


@pytest.mark.parametrize("method", ["lora", "qa_lora"])
def test_codes_of_an_int4_base_ship(tmp_path: Path, method: str) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    run = train(write_recipe(tmp_path, model, base={"quant": "int4"}, adapter={"method": method}))
    found: Any = export_run(RunFolder(run), QUIET, ["int4_exact", "int4_fast"])
    exact, fast = found["int4_exact"], found["int4_fast"]
    assert exact.identical_codes == fast.identical_codes == 14 and exact.top1_agreement == 1
    assert exact.max_logit < 1e-4 < fast.max_logit < 0.1 * exact.reference_perplexity
    for name, expected in (("int4_exact", [0] * 8), ("int4_fast", [4] * 8 + [4])):  # 4 + 4 products, and the head
        nodes = onnx.load(run / "bundles" / name / "onnx" / "model.onnx").graph.node
        frozen = [node for node in nodes if node.op_type == "MatMulNBits"]
        levels = [attribute.i for node in frozen for attribute in node.attribute if attribute.name == "accuracy_level"]
        assert levels == expected
        assert any(node.op_type == "GatherBlockQuantized" for node in nodes) == (name == "int4_fast")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["phi3", "qwen2"])
def test_other_architectures_ship_their_codes(tmp_path: Path, arch: str) -> None:
    """Of Phi-3 the packed q, k, v and gate, up are split: seven matrices a layer as of the others."""
    window = {"sliding_window": 32, "original_max_position_embeddings": 128} if arch == "phi3" else {}
    model = save_tiny_model(tmp_path / "model", arch, intermediate_size=128, **window)
    run = train(write_recipe(tmp_path, model, adapter={"method": "dora"}))
    found: Any = export_run(RunFolder(run), QUIET, ["nf4"])["nf4"]
    assert found.identical_codes == 14 and found.max_logit < 1e-4


def test_bases_without_codes_are_refused(trained_run: Path, tmp_path: Path) -> None:
    run = changed_copy(trained_run, tmp_path / "run", base={"quant": "int8"})
    with pytest.raises(ExportError, match=r"nf4 ships the 4-bit codes.*got 'base.quant=int8'.*Allowed: fp4, nf4"):
        export_run(RunFolder(run), QUIET, ["nf4"])
    with pytest.raises(ExportError, match=r"int4_exact ships the 4-bit codes.*got 'base.quant=int8'.*Allowed: int4"):
        export_run(RunFolder(run), QUIET, ["int4_exact"])
