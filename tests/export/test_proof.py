"""A bundle is proven against the trained model, or it is no bundle; every architecture that has a graph is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qlora_runtime import Bundle, Tolerance, read_manifest
from qlora_runtime.verify import NO_GREEDY_TOKEN
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.errors import ExportError, VerificationError
from qlora_kit.export.bundle import make_bundle
from qlora_kit.export.graph import attention_windows
from qlora_kit.export.reference import Question, ReferenceRow, reference_answers
from qlora_kit.export.verify import PROFILES, Distances, measure

LOOSE = Tolerance(max_logit=100.0, min_top1=0.0, greedy_margin=100.0)
WINDOW = {"sliding_window": 32}
GRAPHS: dict[str, tuple[str, bool, dict[str, Any]]] = {  # architecture, tied head, changes to its config
    "qwen2, biases": ("qwen2", True, {}),
    "qwen2, one layer with a window": ("qwen2", False, WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "mistral with a window": ("mistral", False, WINDOW),
    "gemma": ("gemma", True, {}),
    "gemma2, every other layer with a window": ("gemma2", True, {}),
    "phi3 with a window": ("phi3", False, WINDOW | {"original_max_position_embeddings": 128}),
}

LONG = ("qwen2, biases", "gemma")  # each is a part of another case


def reference_rows(merged: Path) -> list[ReferenceRow]:
    """Rows shorter and longer than the windows above."""
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    questions = []
    for seed, length in enumerate((10, 60, 90)):
        ids = tiny_ids(seed, rows=1, length=length)[0].tolist()
        half = length // 2
        questions.append(Question(ids, [-100] * half + ids[half:], half))
    scratch = merged.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return reference_answers(model, AutoTokenizer.from_pretrained(merged), questions, scratch)


def build(merged: Path, target: Path, profile: str = "fp32", **changes: Any) -> Distances:
    chosen = replace(PROFILES[profile], **changes)
    return make_bundle(merged, target, chosen, reference_rows(merged), {"model": "tiny"}, None, {"a": "1"})


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in LONG else k for k in GRAPHS])
def test_every_architecture_is_proven(tmp_path: Path, kind: str) -> None:
    arch, tie, changes = GRAPHS[kind]
    distances = build(save_tiny_model(tmp_path / "merged", arch, tie, **changes), tmp_path / "fp32")
    assert distances.max_logit < 1e-4 and distances.top1_agreement == 1 and distances.greedy_tokens_compared > 20
    assert Bundle.open(tmp_path / "fp32").manifest.verification.passed  # type: ignore[union-attr]
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "scratch", "fp32"}


def test_windows_of_layers() -> None:
    layers = {"num_hidden_layers": 2}
    assert attention_windows(layers) == attention_windows(layers | {"sliding_window": None}) == [-1, -1]
    assert attention_windows(layers | {"sliding_window": 8}) == [8, 8]
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    assert attention_windows(layers | kinds | {"sliding_window": 8}) == [8, -1]


def test_int8_is_near_and_fp32_is_nearer(tmp_path: Path) -> None:
    merged = save_tiny_model(tmp_path / "merged")
    fp32 = build(merged, tmp_path / "fp32")
    int8 = build(merged, tmp_path / "int8", "int8", reference=LOOSE, max_ratio_all_tokens=2.0)
    assert fp32.mean_kl < 1e-9 < int8.mean_kl < 0.05
    assert int8.top1_agreement > 0.85 and abs(int8.perplexity_ratio - 1) < 0.1
    assert read_manifest(tmp_path / "int8").profile == "int8"


def test_weights_changed_after_the_merge_are_caught(tmp_path: Path) -> None:
    merged = save_tiny_model(tmp_path / "merged")
    rows = reference_rows(merged)
    make_bundle(merged, tmp_path / "fp32", PROFILES["fp32"], rows, {}, None, {})
    weights = load_file(merged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] += 0.05  # one row of one matrix
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"not the model that was trained: a logit differs by.*fp32\.rejected"):
        make_bundle(merged, tmp_path / "fp32", PROFILES["fp32"], rows, {}, None, {})
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "scratch", "fp32.rejected"}, (
        "the old bundle is none either"
    )
    verification = read_manifest(tmp_path / "fp32.rejected").verification
    assert verification is not None and not verification.passed and verification.distances["max_logit"] > 1e-3


def test_each_limit_is_held(exported_run: Path) -> None:
    bundle = Bundle.open(exported_run / "bundles" / "fp32")
    rows, fp32 = reference_rows(exported_run / "merged"), PROFILES["fp32"]
    assert measure(bundle, rows, fp32)[1] == []
    changed = [replace(row, logits=row.logits.copy()) for row in rows]
    for row in changed:
        row.logits[1:, 7] += 50.0  # every top token
    reasons = " ".join(measure(bundle, changed, fp32)[1])
    for words in ("a logit differs by", "top-1 agreement is", "perplexity of completions is"):
        assert words in reasons
    strict = replace(fp32, max_perplexity_ratio=1.0 - 1e-9)
    assert (
        measure(bundle, rows, strict)[1]
        == [reason for reason in measure(bundle, rows, strict)[1] if "perpl" in reason]
        != []
    )
    other = [replace(row, greedy_ids=[5] * 8, margins=[9.0] * 8) for row in rows]
    assert "greedy token 0 is" in measure(bundle, other, fp32)[1][0]


def test_a_rounded_bundle_is_refused_only_beyond_doubt(exported_run: Path) -> None:
    bundle = Bundle.open(exported_run / "bundles" / "fp32")
    rows = reference_rows(exported_run / "merged")
    assert {"completions", "all tokens"} == {
        measure(bundle, rows, PROFILES[name])[0].perplexity_over for name in ("fp32", "int8")
    }
    int8 = replace(PROFILES["int8"], reference=LOOSE)
    settled, reasons = measure(bundle, rows, int8)
    assert reasons == [] and settled.warnings == [NO_GREEDY_TOKEN], "LOOSE compares none"
    noise = np.random.default_rng(0)
    noisy = [replace(row, logits=row.logits + noise.normal(0, 1, row.logits.shape)) for row in rows]
    tight = replace(int8, max_ratio_all_tokens=1.0001)
    open_, reasons = measure(bundle, noisy[:1], replace(tight, max_ratio_all_tokens=1.05))
    assert reasons == [] and "is not resolved by 9 tokens" in open_.warnings[0]
    assert open_.perplexity_ratio_low < open_.perplexity_ratio < open_.perplexity_ratio_high
    far, reasons = measure(bundle, [replace(row, logits=5 * row.logits) for row in rows], tight)
    assert far.perplexity_tokens > 100 and "perplexity of all tokens is" in reasons[0] and "between" in reasons[0]


def test_a_shared_opening_counts_once(exported_run: Path) -> None:
    bundle, row = Bundle.open(exported_run / "bundles" / "fp32"), reference_rows(exported_run / "merged")[1]
    twice = measure(bundle, [row, row], PROFILES["int8"])[0]
    assert twice.rows == 2 and twice.perplexity_tokens == len(row.input_ids) - 1


def test_where_rows_come_from_is_counted_and_said(exported_run: Path) -> None:
    bundle = Bundle.open(exported_run / "bundles" / "fp32")
    rows = reference_rows(exported_run / "merged")
    rows = [replace(rows[0], origin="calibration"), replace(rows[1], origin="training"), rows[2]]
    fp32, int8 = (measure(bundle, rows, replace(PROFILES[name], reference=LOOSE))[0] for name in ("fp32", "int8"))
    assert (fp32.training_rows, fp32.calibration_rows) == (2, 0) and (int8.training_rows, int8.calibration_rows) == (
        2,
        1,
    )
    assert fp32.rows_in_words() == "3 rows (2 of them from training)"
    assert int8.rows_in_words() == "3 rows (2 of them from training, 1 of these calibrated on)"
    assert int8.greedy_in_words() == NO_GREEDY_TOKEN


def test_a_nan_past_the_prompt_is_caught(exported_run: Path) -> None:
    bundle, fp32 = Bundle.open(exported_run / "bundles" / "fp32"), PROFILES["fp32"]
    row = reference_rows(exported_run / "merged")[1]
    logits = np.array(row.logits)
    logits[-1, 3] = float("nan")  # after the last loss position: in no perplexity
    distances, reasons = measure(bundle, [replace(row, logits=logits)], fp32)
    assert distances.max_logit != distances.max_logit and reasons


def test_a_bundle_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    merged = save_tiny_model(tmp_path / "merged")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"fp32 cannot be written.*Free some space"):
        build(merged, tmp_path / "file" / "fp32")
