"""`qlora-kit export` on a tiny run: what is written, what is proven, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_genai import greedy_by_genai
from qlora_runtime import Bundle, Sampling, sha256_file, verify_directory
from qlora_runtime.generate import generate
from rich.console import Console
from tiny_models import save_tiny_model
from tiny_run import changed_copy, label_rows, train, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.cli import main
from qlora_kit.data.template import stop_token_ids
from qlora_kit.errors import ExportError, RunError
from qlora_kit.export.run import export_run
from qlora_kit.generate import decode, generate_ids
from qlora_kit.model.load import to_reference
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder

QUIET = Console(quiet=True)
CHAT = [{"role": "user", "content": "an iron bridge 4?"}]


def snapshot(folder: Path) -> dict[str, str]:
    """File to hash, the lock aside."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): sha256_file(file) for file in files}


@pytest.fixture(scope="module")
def reference(trained_run: Path) -> Any:
    return to_reference(load_tuned(RunFolder(trained_run)))


def test_merged_folder_is_the_reference_for_plain_transformers(exported_run: Path, reference: Any) -> None:
    merged = AutoModelForCausalLM.from_pretrained(exported_run / "merged")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)
    ours = AutoTokenizer.from_pretrained(exported_run / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(exported_run / "merged")
    assert theirs.chat_template == ours.chat_template and theirs.get_vocab() == ours.get_vocab()
    assert merged.generation_config.eos_token_id == stop_token_ids(ours)[0]


def test_bundle_logits_are_the_references(exported_run: Path, reference: Any) -> None:
    ids = torch.arange(3, 60)[None]
    logits = Bundle.open(exported_run / "bundles" / "fp32").logits(ids.numpy())
    with torch.no_grad():
        assert np.abs(logits - reference(ids).logits.numpy()).max() < 1e-3


def test_bundle_says_the_same_text_as_the_reference(exported_run: Path, reference: Any) -> None:
    bundle, tokenizer = (
        Bundle.open(exported_run / "bundles" / "fp32"),
        AutoTokenizer.from_pretrained(exported_run / "tokenizer"),
    )
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert bundle.encode_prompt(CHAT) == prompt
    ids = generate_ids(reference, tokenizer, prompt, 24)
    completion = generate(bundle, CHAT, Sampling(max_new_tokens=24))
    ends = set(stop_token_ids(tokenizer))
    said = [token for token in ids if token not in ends]
    assert [token for token in completion.token_ids if token not in ends] == said and len(said) > 2
    assert completion.text == decode(tokenizer, said)


def test_onnxruntime_genai_runs_the_bundle_folder(exported_run: Path) -> None:
    import onnxruntime_genai as genai

    folder = exported_run / "bundles" / "fp32"
    bundle = Bundle.open(folder)
    prompt = bundle.encode_prompt(CHAT)
    expected = [*bundle.stream(prompt, Sampling(max_new_tokens=20))]
    assert genai.Tokenizer(genai.Model(str(folder))).encode(bundle.render_chat(CHAT)).tolist() == prompt
    assert greedy_by_genai(folder, prompt, 20) == expected


def test_manifest_holds_every_hash_and_distance(exported_run: Path) -> None:
    folder = exported_run / "bundles" / "fp32"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    run = json.loads((exported_run / "manifest.json").read_text(encoding="utf-8"))
    files = {name: record["sha256"] for name, record in manifest["files"].items()}
    assert files == {name: digest for name, digest in snapshot(folder).items() if name != "manifest.json"}
    sources = manifest["provenance"]
    assert sources["base"]["fingerprint"] == run["base"]["fingerprint"] and sources["base"]["files"]
    assert sources["adapter"]["sha256"] == sha256_file(exported_run / "adapter" / "adapter_model.safetensors")
    assert sources["tokenizer_sha256"] == sha256_file(exported_run / "merged" / "tokenizer.json")
    assert sources["chat_template_sha256"] == sha256_file(exported_run / "merged" / "chat_template.jinja")
    assert manifest["verification"]["passed"] is True
    distances, tolerance = manifest["verification"]["distances"], manifest["verification"]["tolerance"]
    assert 0 < distances["max_logit"] < tolerance["max_logit"] and distances["top1_agreement"] == 1
    assert distances["rows"] == 4 and distances["greedy_tokens_equal"] == distances["greedy_tokens_compared"] > 0
    assert abs(distances["perplexity_ratio"] - 1) < 1e-4 and distances["mean_kl"] < 1e-6
    assert {"onnxruntime", "onnxruntime-genai", "torch"} <= set(manifest["tools"])
    assert verify_directory(folder).passed


def test_few_held_out_rows_are_filled_up_from_training(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed_copy(trained_run, tmp_path / "run", export={"verify_prompts": 30, "merged": False})
    assert main(["export", str(run), "--profiles", "fp32"]) == 0
    manifest = json.loads((run / "bundles" / "fp32" / "manifest.json").read_text(encoding="utf-8"))
    distances = manifest["verification"]["distances"]
    assert (distances["rows"], distances["training_rows"]) == (30, 18) and distances["perplexity_over"] == "completions"
    assert distances["warnings"] == []
    said = " ".join(capsys.readouterr().err.split())
    assert "verified on 30 rows (18 of them from training):" in said


def test_too_few_rows_prove_nothing(trained_run: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "one.jsonl", label_rows(1))
    data = {"eval": str(held_out), "streaming": True}
    run = RunFolder(changed_copy(trained_run, tmp_path / "run", data=data))
    with pytest.raises(
        ExportError, match=r"too little to prove a bundle on \(got '1 rows.*Put more or longer rows into data.eval"
    ):
        export_run(run, QUIET)
    assert not run.merged.exists()


def test_no_path_of_this_machine_is_shipped(exported_run: Path) -> None:
    for file in (exported_run / "bundles" / "fp32").rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            assert str(exported_run.parent).encode() not in file.read_bytes(), file.name


def test_merge_report_names_every_layer(exported_run: Path) -> None:
    report = json.loads((exported_run / "merge.json").read_text(encoding="utf-8"))
    assert len(report) == 14 and all(0 < layer["ratio"] < 2 for layer in report)


def test_exporting_twice_gives_the_same_bundle(exported_run: Path, tmp_path: Path) -> None:
    run = changed_copy(exported_run, tmp_path / "run", export={"merged": False})
    before = snapshot(run / "bundles" / "fp32")
    export_run(RunFolder(run), QUIET)
    after = snapshot(run / "bundles" / "fp32")
    assert {name for name in after if after[name] != before.get(name)} <= {"manifest.json"}, "but for its date"
    assert after.keys() == before.keys()
    assert not (run / "merged").exists(), "export.merged: false"


def test_refusals_write_nothing(trained_run: Path, tmp_path: Path) -> None:
    run = RunFolder(changed_copy(trained_run, tmp_path / "run"))
    before = snapshot(run.path)
    with pytest.raises(ExportError, match=r"no such profile \(got 'fp16'\)\. Allowed: fp32, int8"):
        export_run(run, QUIET, ["fp32", "fp16"])
    weights = run.adapter / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors was changed after training"):
        export_run(run, QUIET)
    shutil.rmtree(run.adapter)
    with pytest.raises(RunError, match=r"is not finished.*--resume"):
        export_run(run, QUIET)
    assert {name: digest for name, digest in before.items() if "adapter/" not in name or "check" in name} == snapshot(
        run.path
    )


def test_new_tokens_are_in_every_form(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"), adapter={"new_tokens": ["<yes>", "<no>"]})
    run = train(recipe)
    assert main(["export", str(run)]) == 0
    assert main(["eval", str(run)]) == 0
    bundle = Bundle.open(run / "bundles" / "fp32")
    assert bundle.tokenizer.encode("<yes>") == [320] and bundle.logits([[320, 321]]).shape == (1, 2, 322)
    forms = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))["forms"]
    assert list(forms) == ["base", "base_nf4", "tuned", "merged", "bundle_fp32"]
