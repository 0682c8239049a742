"""Graphs of tasks: every architecture and task is proven against torch, in both profiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from qlora_runtime import TaskBundle, read_manifest, verify_directory
from qlora_runtime.encoder import TokenRow
from qlora_runtime.texts import EncodedText
from safetensors.torch import load_file, save_file
from tiny_tasks import TASKS, make_tiny_bundle, save_task_model, task_tokenizer

from qlora_kit.errors import VerificationError
from qlora_kit.export import task_graph
from qlora_kit.export.task_graph import OPSET, input_names

ODD_LENGTHS = (1, 7, 2, 40, 31, 7, 13)


def random_rows(vocabulary: int, two_texts: bool) -> list[TokenRow]:
    """Rows of odd lengths; of one that may hold two texts, a part belongs to the second."""
    draw = np.random.default_rng(0)
    return [
        EncodedText(
            draw.integers(5, vocabulary, length),
            (np.arange(length) > length // 2).astype(np.int64) * two_texts,
            truncated=False,
        )
        for length in ODD_LENGTHS
    ]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_proven(tmp_path: Path, name: str) -> None:
    tiny = TASKS[name]
    merged = save_task_model(tmp_path / "merged", tiny)
    found = make_tiny_bundle(tiny, merged, tmp_path / "fp32")
    assert found.report.max_logit_difference < 1e-4 and found.report.decisions_equal == found.report.decisions  # type: ignore[operator]
    manifest = read_manifest(tmp_path / "fp32")
    assert manifest.task == tiny.info and manifest.model.context_length == 64
    assert manifest.verification is not None and manifest.verification.passed
    assert verify_directory(tmp_path / "fp32").passed

    bundle = TaskBundle.open(tmp_path / "fp32", threads=1)
    model = getattr(transformers, tiny.auto_class).from_pretrained(merged).eval()
    inputs = input_names(model, task_tokenizer(tiny.arch))
    rows = random_rows(model.config.vocab_size, two_texts="token_type_ids" in inputs)
    together = [logits for _, (logits,) in bundle.run((row, [row]) for row in rows)]
    for row, logits in zip(rows, together):
        values = {"input_ids": row.input_ids, "attention_mask": np.ones_like(row.input_ids)}
        values["token_type_ids"] = row.type_ids
        with torch.no_grad():
            output = model(**{key: torch.from_numpy(values[key][None]) for key in inputs})
        if "logits" in output:
            expected = output.logits.numpy().reshape(logits.shape)
        else:
            expected = np.stack([output.start_logits[0], output.end_logits[0]], axis=-1)
        np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)
        ((alone,),) = [found for _, found in bundle.run([(row, [row])])]
        np.testing.assert_allclose(alone, logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert tags", "llama rates"])
def test_int8_rounds_all_products_but_the_head(tmp_path: Path, name: str) -> None:
    tiny = TASKS[name]
    merged = save_task_model(tmp_path / "merged", tiny)
    try:
        make_tiny_bundle(tiny, merged, tmp_path / "int8", "int8")
        folder = tmp_path / "int8"
    except VerificationError:  # random weights decide narrowly; what matters here is the graph
        folder = tmp_path / "int8.rejected"
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    heads = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    layers = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(heads) == 1 and len(layers) == {"bert": 12, "llama": 14}[tiny.arch]
    for node in layers:
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        assert (settings["bits"], settings["block_size"], settings["accuracy_level"]) == (8, 32, 4)
    verification = read_manifest(folder).verification
    assert verification is not None
    distances = verification.distances
    assert distances["max_logit_difference"] > 0 and distances["decisions_equal"] >= 0.9 * distances["decisions"]


def test_large_embeddings_are_8_bit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_graph, "LARGE_TABLE", 100 * 32)  # of words alone, not of positions
    tiny = TASKS["bert tags"]
    merged = save_task_model(tmp_path / "merged", tiny)
    words = load_file(merged / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    task_graph.build_task_graph(merged, tmp_path, "int8", tiny.auto_class, task_tokenizer(tiny.arch))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    (looked_up,) = [node for node in graph.graph.node if node.op_type == "GatherBlockQuantized"]
    assert not any(
        tuple(tensor.dims) == tuple(words.shape) and tensor.data_type == 1 for tensor in graph.graph.initializer
    )
    graph.graph.output.append(onnx.helper.make_tensor_value_info(looked_up.output[0], 1, None))
    session = ort.InferenceSession(graph.SerializeToString())
    ids = np.array([[7, 2, 119]])
    given = {one.name: ids if one.name == "input_ids" else ids.clip(0, 1) for one in session.get_inputs()}
    found = session.run([looked_up.output[0]], given)[0][0]
    expected = words[ids[0]].numpy()
    step = np.abs(expected).max(1, keepdims=True) / 127  # one block a row
    assert (np.abs(found - expected) <= 0.51 * step).all() and (found != expected).any()


def test_weights_changed_after_the_merge_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TASKS["bert classifies"]
    merged = save_task_model(tmp_path / "merged", tiny)
    changed = save_task_model(tmp_path / "changed", tiny)
    weights = load_file(changed / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][0] += 0.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})

    from qlora_kit.export import task_bundle

    build = task_bundle.build_task_graph
    monkeypatch.setattr(task_bundle, "build_task_graph", lambda _, *rest: build(changed, *rest))
    with pytest.raises(VerificationError, match=r"not the model that was trained: a logit differs by.*fp32\.rejected"):
        make_tiny_bundle(tiny, merged, tmp_path / "fp32")
    assert not (tmp_path / "fp32").exists()
    verification = read_manifest(tmp_path / "fp32.rejected").verification
    assert verification is not None and not verification.passed


def test_the_graph_has_stable_names(tmp_path: Path) -> None:
    tiny = TASKS["bert answers"]
    make_tiny_bundle(tiny, save_task_model(tmp_path / "merged", tiny), tmp_path / "fp32")
    model = onnx.load(tmp_path / "fp32" / "onnx" / "model.onnx")
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in model.graph.output] == ["start_logits", "end_logits"]
    assert model.opset_import[0].version == OPSET
