"""Speech recognition: from sounds to a trained adapter, on a tiny random Whisper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_media import (
    RATE,
    adapter_bytes,
    media_recipe,
    save_tiny_image_model,
    save_tiny_whisper,
    train_losses,
    trained,
    whisper_processor,
    write_tone,
    write_tones,
)
from tiny_run import killed_after

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import DataError, ModelError
from qlora_kit.model.load import load_base
from qlora_kit.model.processor import load_processor
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base
from qlora_kit.recipe import Recipe
from qlora_kit.tasks.images import in_model_dtype
from qlora_kit.tasks.speech import read_sound, transcript_ids
from qlora_kit.train.adapted_model import architecture_of
from qlora_kit.train.restore import load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder

STEPS = 28
LEARNING = {"max_steps": STEPS, "save_every": STEPS // 2, "lr": 0.01, "schedule": "constant"}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Manifests to train and evaluate on, as the data section names them."""
    folder = tmp_path_factory.mktemp("sounds")
    parts = {"train": write_tones(folder / "train", 12), "eval": write_tones(folder / "eval", 5, seed=500)}
    return {name: str(path) for name, path in parts.items()}


def recipe_of(folder: Path, model: Path, data: dict[str, str], **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {"task": {"max_target_len": 16}, "adapter": {"rank": 16, "alpha": 32}}
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return media_recipe(folder, "speech_recognition", model, data, **sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, whisper: Path, sounds: dict[str, str]) -> RunFolder:
    """A finished run; only to be read."""
    return trained(recipe_of(tmp_path_factory.mktemp("run"), whisper, sounds, train=LEARNING))


def test_its_convolutions_can_be_adapted(tmp_path: Path, whisper: Path, sounds: dict[str, str]) -> None:
    adapter = {"target_modules": ["conv1", "conv2", "q_proj"]}
    run = trained(recipe_of(tmp_path, whisper, sounds, adapter=adapter, train={"max_steps": 2, "save_every": 2}))
    kinds = [type(layer).__name__ for _, layer in adapted_layers(load_tuned(run))]
    assert kinds.count("LoraConv") == 2


def held_out_batch(run: RunFolder) -> dict[str, torch.Tensor]:
    task, processor = run_task(run), load_run_tokenizer(run)
    return task.collate(list(prepare(run.recipe().data, processor, 0, task).eval), processor)


def test_it_learns_to_tell_two_tones(run: RunFolder) -> None:
    losses = train_losses(run)
    assert np.mean(losses[-4:]) < 0.2 * losses[0]
    records = run.metrics()
    assert all(record["tokens"] == record["loss_tokens"] == 4 * 6 for record in records if record["kind"] == "train")
    assert records[-1]["perplexity"] == pytest.approx(np.exp(records[-1]["loss"]))


def test_the_tuned_model_writes_down_what_it_hears(run: RunFolder) -> None:
    processor, batch = load_run_tokenizer(run), held_out_batch(run)
    model: Any = load_tuned(run)
    said = model.generate(**in_model_dtype(model, {"input_features": batch["input_features"]}), max_new_tokens=12)
    texts = processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    assert jiwer.wer(["hi", "lo"] * 5, texts) <= 0.2


def test_killed_and_resumed_it_ends_in_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    killed = RunFolder(killed_after(run.path, STEPS // 2, tmp_path / "runs" / "media"))
    section = run.recipe().run.model_copy(update={"out_dir": str(tmp_path / "runs")})
    trained(run.recipe().model_copy(update={"run": section}), resume=True)
    assert killed.manifest()["resumes"] == [STEPS // 2]
    assert adapter_bytes(killed) == adapter_bytes(run)


def test_all_linear_layers_but_the_head_are_quantized_and_adapted(run: RunFolder) -> None:
    model = load_tuned(run)
    layers = dict(adapted_layers(model))
    assert len(layers) == 2 * 6 + 2 * 10 and "proj_out" not in layers
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers.values())
    assert all("lora" in name for name in trainable_parameters(model))


def test_peft_loads_the_adapter_and_computes_the_same(run: RunFolder) -> None:
    source, architecture = find_base(run.recipe().base.model), architecture_of(run_task(run))
    theirs, ours = (
        load_base(source, "none", compute_dtype=torch.float32, architecture=architecture) for _ in ("theirs", "ours")
    )
    batch = held_out_batch(run)
    inputs = {"input_features": batch["input_features"][:2], "decoder_input_ids": batch["labels"][:2, :6]}
    with torch.no_grad():
        untuned = ours(**inputs).logits
        load_adapter(ours, run.adapter)
        got = ours.eval()(**inputs).logits
        expected = PeftModel.from_pretrained(theirs, str(run.adapter)).eval()(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    assert (got - untuned).abs().max() > 0.5


@pytest.mark.parametrize(("quant", "compute_dtype"), [("int8", "bf16"), ("nf4", "fp16")])
def test_other_bases_and_dtypes_learn_too(
    tmp_path: Path, whisper: Path, sounds: dict[str, str], quant: str, compute_dtype: str
) -> None:
    base = {"quant": quant, "compute_dtype": compute_dtype}
    train = {**LEARNING, "max_steps": 8, "gradient_checkpointing": True}
    losses = train_losses(trained(recipe_of(tmp_path, whisper, sounds, base=base, train=train)))
    assert np.mean(losses[-2:]) < 0.6 * losses[0]


def test_losses_are_transformers_own(run: RunFolder) -> None:
    task, batch = run_task(run), held_out_batch(run)
    batch["labels"][0, 4:] = -100  # a row that is shorter
    model = load_tuned(run).float()
    model.config.dtype = torch.float32
    losses, counted = task.losses(model, batch)
    assert task.count(batch) == int(counted.sum()) and bool((losses[~counted] == 0).all())
    torch.testing.assert_close(losses.sum() / counted.sum(), model(**batch).loss)


def test_labels_are_what_follows_the_start_of_a_transcript() -> None:
    tokenizer = whisper_processor().tokenizer
    ids = transcript_ids("lo", tokenizer)
    tokens = ["<|en|>", "<|transcribe|>", "<|notimestamps|>", "l", "o", "<|endoftext|>"]
    assert ids.dtype == np.int32 and tokenizer.convert_ids_to_tokens(ids.tolist()) == tokens


def test_other_sampling_rates_sound_the_same(tmp_path: Path) -> None:
    there, other = (write_tone(tmp_path / f"{rate}.wav", 440, rate=rate) for rate in (RATE, 44100))
    expected, got = read_sound(there, RATE), read_sound(other, RATE)
    assert got.dtype == np.float32 and len(got) == len(expected) == RATE // 2
    spectrum = np.abs(np.fft.rfft(got))
    assert np.argmax(spectrum) * RATE / len(got) == pytest.approx(440, abs=2)
    np.testing.assert_allclose(got[1000:-1000], expected[1000:-1000], atol=0.15)  # their noise differs


def write_manifest(folder: Path, rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"audio": audio, "text": text}) + "\n" for audio, text in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder / "rows.jsonl")


def test_wrong_rows_are_named(tmp_path: Path, whisper: Path, sounds: dict[str, str]) -> None:
    whole = write_tone(tmp_path / "whole.wav", 300)
    write_tone(tmp_path / "long.wav", 300, seconds=1.5)
    (tmp_path / "cut.wav").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    for name, text, says in (
        ("cut.wav", "lo", r"rows.jsonl row 2: .*cut.wav is cut"),
        ("text.wav", "lo", r"rows.jsonl row 2: .*text.wav is no .wav file"),
        ("none.wav", "lo", r"rows.jsonl row 2: no file .*none.wav"),
        ("long.wav", "lo", r"rows.jsonl row 2: .*long.wav lasts 1.5 s, the model hears 1 s.*Split it"),
        ("whole.wav", "lo " * 9, r"rows.jsonl row 2: 31 tokens, more than task.max_target_len 16.*Raise"),
    ):
        rows = [("whole.wav", "lo"), (name, text)]
        data = {"train": write_manifest(tmp_path, rows), "eval": sounds["eval"], "overlong": "error"}
        with pytest.raises(DataError, match=says):
            trained(recipe_of(tmp_path, whisper, data))


def test_rows_that_do_not_fit_are_left_out_and_counted(tmp_path: Path, whisper: Path, sounds: dict[str, str]) -> None:
    write_tone(tmp_path / "whole.wav", 300)
    write_tone(tmp_path / "long.wav", 300, seconds=1.5)
    rows = [("whole.wav", "lo"), ("long.wav", "lo"), ("whole.wav", "hi")]
    data = {"train": write_manifest(tmp_path, rows), "eval": sounds["eval"]}
    run = trained(recipe_of(tmp_path, whisper, data, train={"max_steps": 1}))
    assert run.manifest()["data"]["train"][0]["skipped"] == {"overlong": 1}


def test_transcripts_longer_than_the_decoder_are_refused(tmp_path: Path, whisper: Path, sounds: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"got 25.*Set task.max_target_len=24"):
        trained(recipe_of(tmp_path, whisper, sounds, task={"max_target_len": 25}))


def test_other_processors_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_image_model(tmp_path / "vit")
    with pytest.raises(ModelError, match="processor"):
        load_processor(folder, "AutoProcessor")
    whisper_processor().tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match=r"windows of fixed length.*WhisperProcessor"):
        load_processor(tmp_path / "words", "AutoProcessor")
