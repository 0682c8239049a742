"""Decoders that onnxruntime-genai's builder does not know: written by torch, with a cache that grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from by_genai import greedy_by_genai
from qlora_runtime import Bundle, Sampling, verify_directory
from qlora_runtime.decoder import GrowingDecoding
from qlora_runtime.generate import generate
from tiny_models import save_tiny_model, tiny_tokenizer
from tiny_run import train, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.cli import main
from qlora_kit.errors import ExportError
from qlora_kit.export import task_graph
from qlora_kit.export.traced_graph import build_traced_graph
from qlora_kit.generate import generate_ids
from qlora_kit.model.load import to_reference
from qlora_kit.train.restore import load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder

KINDS = ["gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)]
PROMPTS = ([7], [3, 50, 9, 120, 200, 11], list(range(20, 60)))


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny model, trained on NF4 with LoRA, and its fp32 and int8 bundles."""
    folder = tmp_path_factory.mktemp(request.param)
    export = {"profiles": ["fp32", "int8"], "verify_prompts": 6}
    run = train(write_recipe(folder, save_tiny_model(folder / "model", request.param), export=export))
    assert main(["export", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def reference(exported: Path) -> Any:
    return to_reference(load_tuned(RunFolder(exported)))


def test_logits_are_the_references_alone_and_padded(exported: Path, reference: Any) -> None:
    bundle = Bundle.open(exported / "bundles" / "fp32", threads=1)
    length = max(map(len, PROMPTS))
    ids = np.array([[*prompt, *[0] * (length - len(prompt))] for prompt in PROMPTS])
    mask = np.array([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in PROMPTS])
    together = bundle.logits(ids, mask)
    for prompt, padded in zip(PROMPTS, together):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(bundle.logits([prompt])[0], expected, atol=1e-4)
        np.testing.assert_allclose(padded[: len(prompt)], expected, atol=1e-4)


def test_greedy_answers_are_the_references(exported: Path, reference: Any) -> None:
    bundle = Bundle.open(exported / "bundles" / "fp32", threads=1)
    assert isinstance(bundle._decoder.start(4), GrowingDecoding)
    for prompt in PROMPTS:
        found = list(bundle.stream(prompt, Sampling(max_new_tokens=20)))
        assert found == generate_ids(reference, load_run_tokenizer(RunFolder(exported)), list(prompt), 20)


def test_bundles_are_proven_and_checked_again(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for profile in ("fp32", "int8"):
        folder = exported / "bundles" / profile
        proof = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["verification"]
        assert proof["passed"] and proof["distances"]["greedy_tokens_compared"] > 0
        assert verify_directory(folder).passed
        assert generate(Bundle.open(folder), "An iron", Sampling(max_new_tokens=4)).token_ids


def test_int8_keeps_one_copy_of_a_tied_head(exported: Path) -> None:
    graph = onnx.load(exported / "bundles" / "int8" / "onnx" / "model.onnx").graph
    large = [tensor.dims for tensor in graph.initializer if 320 in tensor.dims and tensor.data_type != 1]
    assert sorted(map(list, large)) == [[320, 2], [320, 2, 32]], "codes and zero points, no table beside them"
    assert {made.op_type for made in graph.node} >= {"GatherBlockQuantized", "MatMulNBits"}


@pytest.mark.parametrize("tied", [True, False])
def test_large_tables_are_codes(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_graph, "LARGE_TABLE", 1)
    merged, target = save_tiny_model(tmp_path / "merged", "gpt2", tie=tied), tmp_path / "bundle"
    target.mkdir()
    build_traced_graph(merged, target, "int8")
    graph = onnx.load(target / "onnx" / "model.onnx").graph
    codes = [tensor.name for tensor in graph.initializer if 320 in tensor.dims and tensor.name.endswith("_Q8")]
    assert len(codes) == (1 if tied else 2)
    assert [made.op_type for made in graph.node].count("GatherBlockQuantized") == 2, "of tokens and of positions"
    session = ort.InferenceSession(target / "onnx" / "model.onnx")
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    ids = np.arange(3, 40)[None]
    (found,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(merged)(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_onnxruntime_genai_answers_the_same(exported: Path) -> None:
    folder, prompt = exported / "bundles" / "fp32", PROMPTS[1]
    bundle = Bundle.open(folder)
    greedy = list(bundle.stream(prompt, Sampling(max_new_tokens=12)))
    ends = bundle.manifest.model.eos_token_ids
    assert greedy_by_genai(folder, prompt, 12) == [token for token in greedy if token not in ends]


def test_other_profiles_are_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(exported), "--profiles", "int4"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "int4 is for the decoders that onnxruntime-genai's builder knows" in error and "Allowed: fp32, int8" in error


def test_models_that_keep_something_else_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    with pytest.raises(ExportError, match=r"MambaForCausalLM could not be written .* that keep keys and values"):
        build_traced_graph(tmp_path / "merged", tmp_path / "bundle", "fp32")
