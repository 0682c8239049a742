"""Tiny random models of images and sounds, what they learn from, and runs on them: the same each time."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.loop import train
from qlora_kit.train.progress import QuietProgress
from qlora_kit.train.run_folder import RunFolder

SIDE = 32
RATE = 16000
TONES = {"hi": 1800.0, "lo": 300.0}  # Hz
WHISPER_SHAPE = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
COLOURS = {"blue": (40, 60, 200), "red": (200, 60, 40)}


def tiny_image_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """vit, convnext or resnet, random in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "vit":
            shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            size: dict[str, Any] = {"intermediate_size": 64, "image_size": SIDE, "patch_size": 8}
            return ViTForImageClassification(ViTConfig(**shape, **size))
        stages: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
        if kind == "convnext":
            return ConvNextForImageClassification(
                ConvNextConfig(**stages, initializer_range=0.2, layer_scale_init_value=1.0)
            )
        return ResNetForImageClassification(ResNetConfig(**stages, embedding_size=8, layer_type="basic"))


def save_tiny_image_model(folder: Path, kind: str = "vit", seed: int = 0) -> Path:
    """Writes a model folder with its image processor. Returns `folder`."""
    tiny_image_model(kind, seed).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def write_image(path: Path, colour: tuple[int, int, int], seed: int = 0) -> Path:
    """A noisy image of one colour, of a size that the processor has to change."""
    noise = np.random.default_rng(seed).integers(-30, 31, (24, 40, 3))
    Image.fromarray(np.clip(noise + np.array(colour), 0, 255).astype(np.uint8)).save(path)
    return path


def write_images(folder: Path, each: int, seed: int = 0) -> Path:
    """A folder with `each` images of every colour, in a subfolder named after it. Returns `folder`."""
    for k, (label, colour) in enumerate(COLOURS.items()):
        (folder / label).mkdir(parents=True)
        for n in range(each):
            write_image(folder / label / f"{n:02}.png", colour, seed=seed + 1000 * k + n)
    return folder


def whisper_processor() -> WhisperProcessor:
    """Windows of one second; a byte-level tokenizer without merges, told English and transcription."""
    letters = {letter: k for k, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|transcribe|>",
        "<|translate|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizer(vocab=letters, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, chunk_length=1), tokenizer)


def save_tiny_whisper(folder: Path, seed: int = 0) -> Path:
    """Writes a model folder with its processor: 2 layers each, width 64, random in fp32. Returns `folder`."""
    processor = whisper_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    shape: dict[str, Any] = {
        f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in WHISPER_SHAPE.items()
    }
    config = WhisperConfig(
        **shape,
        vocab_size=len(processor.tokenizer),
        d_model=64,
        num_mel_bins=80,
        max_source_positions=50,
        max_target_positions=24,
        decoder_start_token_id=ids("<|startoftranscript|>"),
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids("<|endoftext|>"),
        begin_suppress_tokens=None,
        init_std=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = WhisperForConditionalGeneration(config)
        model.get_input_embeddings().weight.data.normal_(0, config.init_std)  # torch leaves padding's, the end's, at 0
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tone(path: Path, hertz: float, seconds: float = 0.5, rate: int = RATE, seed: int = 0) -> Path:
    """A sine of one pitch with some noise, 16 bit mono."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(times))
    samples = np.clip(0.5 * np.sin(2 * np.pi * hertz * times) + noise, -1, 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def write_tones(folder: Path, each: int, seed: int = 0) -> Path:
    """`each` sounds of every pitch, and a manifest that says which. Returns the manifest."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(each * len(TONES)):
        word, hertz = list(TONES.items())[k % len(TONES)]
        write_tone(folder / f"{k:02}.wav", hertz, 0.3 + 0.05 * (k % 5), rate=(RATE, 22050)[k % 3 == 0], seed=seed + k)
        rows.append({"audio": f"{k:02}.wav", "text": word})
    manifest = folder / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def media_recipe(folder: Path, kind: str, model: Path, data: dict[str, str], **changes: dict[str, Any]) -> Recipe:
    """20 steps of 4 rows on an nf4 base, the run below `folder`. `changes` go into the sections."""
    tree: dict[str, Any] = {
        "run": {"name": "media", "seed": 3, "out_dir": str(folder / "runs")},
        "task": {"type": kind},
        "base": {"model": str(model), "quant": "nf4", "compute_dtype": "bf16"},
        "adapter": {"rank": 4},
        "data": data,
        "train": {
            "lr": 5e-3,
            "micro_batch_size": 4,
            "max_steps": 20,
            "save_every": 10,
            "gradient_checkpointing": False,
            "threads": 1,
        },
        "eval": {"samples": 0},
    }
    for section, fields in changes.items():
        tree.setdefault(section, {}).update(fields)
    return parse_recipe(tree)


def trained(recipe: Recipe, resume: bool = False) -> RunFolder:
    """The run of a recipe, finished."""
    run = RunFolder(Path(recipe.run.out_dir) / recipe.run.name)
    train(recipe, run, QuietProgress(), resume=resume)
    return run


def train_losses(run: RunFolder) -> list[float]:
    return [record["loss"] for record in run.metrics() if record["kind"] == "train"]


def adapter_bytes(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()
