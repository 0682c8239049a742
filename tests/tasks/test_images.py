"""Image classification: from files to a trained adapter, on tiny random models."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from tiny_media import (
    COLOURS,
    SIDE,
    adapter_bytes,
    media_recipe,
    save_tiny_image_model,
    train_losses,
    trained,
    write_image,
    write_images,
)
from tiny_run import killed_after
from torch import Tensor

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import DataError, ModelError, TrainingError
from qlora_kit.model.load import load_base
from qlora_kit.model.processor import load_processor
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base
from qlora_kit.recipe import Recipe
from qlora_kit.tasks.images import in_model_dtype
from qlora_kit.tasks.registry import prepare_task
from qlora_kit.train.adapted_model import architecture_of
from qlora_kit.train.restore import load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_image_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders to train and evaluate on, as the data section names them."""
    folder = tmp_path_factory.mktemp("images")
    parts = {"train": write_images(folder / "train", 12), "eval": write_images(folder / "eval", 6, seed=500)}
    return {name: str(path) for name, path in parts.items()}


def recipe_of(folder: Path, model: Path, data: dict[str, str], **changes: dict[str, Any]) -> Recipe:
    return media_recipe(folder, "image_classification", model, data, **changes)


def accuracy(run: RunFolder) -> float:
    """Share of the held-out images that the tuned model labels right, by a plain forward pass."""
    task, processor, model = run_task(run), load_run_tokenizer(run), load_tuned(run)
    rows = list(prepare(run.recipe().data, processor, 0, task).eval)
    batch = task.collate(rows, processor)
    with torch.no_grad():
        logits: Tensor = model(pixel_values=batch["pixel_values"].to(torch.bfloat16)).logits
    return (logits.argmax(1) == batch["labels"]).float().mean().item()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vit: Path, images: dict[str, str]) -> RunFolder:
    """A finished run of 20 steps; only to be read."""
    return trained(recipe_of(tmp_path_factory.mktemp("run"), vit, images))


def test_it_learns_to_tell_two_colours(run: RunFolder) -> None:
    losses = train_losses(run)
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert run.manifest()["results"]["final_eval_loss"] < 0.5
    assert accuracy(run) == 1.0
    assert run.manifest()["task"]["labels"] == list(COLOURS)
    assert all(record["tokens"] == 4 for record in run.metrics() if record["kind"] == "train")  # images


def test_killed_and_resumed_it_ends_in_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    killed = RunFolder(killed_after(run.path, 10, tmp_path / "runs" / "media"))
    section = run.recipe().run.model_copy(update={"out_dir": str(tmp_path / "runs")})
    trained(run.recipe().model_copy(update={"run": section}), resume=True)
    assert killed.manifest()["resumes"] == [10]
    assert adapter_bytes(killed) == adapter_bytes(run)


def test_the_base_is_quantized_and_the_head_is_trained_in_full(run: RunFolder) -> None:
    model = load_tuned(run)
    layers = dict(adapted_layers(model))
    assert len(layers) == 12  # q, k, v, o, fc1, fc2 of two blocks
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in layers.values())
    assert {name for name in trainable_parameters(model) if "lora" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_peft_loads_the_adapter_and_computes_the_same(run: RunFolder) -> None:
    source, architecture = find_base(run.recipe().base.model), architecture_of(run_task(run))
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    theirs, ours = (
        load_base(source, "none", compute_dtype=torch.float32, architecture=architecture) for _ in ("theirs", "ours")
    )
    with torch.no_grad():
        untuned = ours(pixel_values=pixels).logits
        load_adapter(ours, run.adapter)
        got = ours.eval()(pixel_values=pixels).logits
        expected = PeftModel.from_pretrained(theirs, str(run.adapter)).eval()(pixel_values=pixels).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - untuned).abs().max() > 0.1


@pytest.mark.parametrize(("quant", "compute_dtype"), [("int8", "bf16"), ("nf4", "fp16"), ("none", "fp32")])
def test_other_bases_and_dtypes_learn_too(
    tmp_path: Path, vit: Path, images: dict[str, str], quant: str, compute_dtype: str
) -> None:
    base = {"quant": quant, "compute_dtype": compute_dtype}
    losses = train_losses(trained(recipe_of(tmp_path, vit, images, base=base, train={"gradient_checkpointing": True})))
    assert np.mean(losses[-4:]) < 0.5 * losses[0]


def test_a_convolutional_base_adapts_its_convolutions(tmp_path: Path, images: dict[str, str]) -> None:
    model = save_tiny_image_model(tmp_path / "convnext", "convnext")
    targets = ["pwconv1", "pwconv2", "patch_embeddings", "downsampling_layer.1"]
    run = trained(recipe_of(tmp_path, model, images, adapter={"target_modules": targets}, train={"lr": 0.02}))
    losses, layers = train_losses(run), dict(adapted_layers(load_tuned(run)))
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert {type(layer).__name__ for layer in layers.values()} == {"LoraLinear", "LoraConv"}
    assert accuracy(run) == 1.0


def test_the_patches_of_a_transformer_can_be_adapted(tmp_path: Path, vit: Path, images: dict[str, str]) -> None:
    adapter = {"target_modules": ["projection", "q_proj"]}
    run = trained(recipe_of(tmp_path, vit, images, adapter=adapter, train={"max_steps": 2, "save_every": 2}))
    assert "LoraConv" in {type(layer).__name__ for _, layer in adapted_layers(load_tuned(run))}


def test_a_row_keeps_its_path_and_no_pixels(vit: Path, images: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, vit, images)
    task, processor = prepare_task(recipe.task, recipe.data), load_processor(vit, "AutoImageProcessor")
    rows = prepare(recipe.data, processor, 0, task).train
    assert [row.file for row in rows[:2]] == [f"{images['train']}/blue/{n:02}.png" for n in range(2)]
    assert rows[0].input_ids.tolist() == [0] and rows[-1].labels.tolist() == [1]
    batch = task.collate(rows[:2], processor)
    first = np.asarray(Image.open(rows[0].file).resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    torch.testing.assert_close(
        batch["pixel_values"][0], torch.from_numpy(first / 127.5 - 1).permute(2, 0, 1), atol=1e-5, rtol=0
    )
    assert torch.equal(task.collate(rows[:2], processor)["pixel_values"], batch["pixel_values"])  # nothing at random


def test_losses_are_transformers_own(run: RunFolder) -> None:
    task, processor = run_task(run), load_run_tokenizer(run)
    batch = task.collate(list(prepare(run.recipe().data, processor, 0, task).eval)[4:9], processor)
    model = load_tuned(run).float()
    model.config.dtype = torch.float32
    losses, counted = task.losses(model, batch)
    assert losses.shape == (5, 1) and bool(counted.all()) and task.count(batch) == 5
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
    assert in_model_dtype(load_tuned(run), batch)["pixel_values"].dtype == torch.bfloat16


def test_a_manifest_names_images_beside_it(tmp_path: Path, vit: Path, images: dict[str, str]) -> None:
    write_images(tmp_path / "pictures", 6, seed=50)
    rows = [(f"pictures/{label}/{n:02}.png", label) for n in range(6) for label in COLOURS]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
    data = {"train": str(tmp_path / "rows.csv"), "eval": images["eval"]}
    run = trained(recipe_of(tmp_path, vit, data, train={"max_steps": 2}))
    assert run.manifest()["data"]["train"][0]["used"] == 12


def test_wrong_files_are_named_with_their_row(tmp_path: Path, vit: Path, images: dict[str, str]) -> None:
    whole = write_image(tmp_path / "whole.jpg", (9, 9, 9))
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:400])  # its header is whole
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    for name, says in {
        "cut.jpg": r"rows.jsonl row 2: .*cut.jpg is no image that can be read",
        "text.png": r"rows.jsonl row 2: .*text.png is no image that can be read",
        "none.png": r"rows.jsonl row 2: no file .*none.png",
    }.items():
        rows = [{"image": "whole.jpg", "label": "red"}, {"image": name, "label": "blue"}]
        lines = [*rows, {"image": "whole.jpg", "label": "blue"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        data = {"train": str(tmp_path / "rows.jsonl"), "eval": images["eval"]}
        with pytest.raises(DataError, match=says):
            trained(recipe_of(tmp_path, vit, data))


def test_an_unknown_label_is_refused(tmp_path: Path, vit: Path, images: dict[str, str]) -> None:
    with pytest.raises(DataError, match="'blue', which is not among the labels"):
        trained(recipe_of(tmp_path, vit, images, task={"labels": ["green", "red"]}))


def test_batch_normalization_is_refused(tmp_path: Path, images: dict[str, str]) -> None:
    model = save_tiny_image_model(tmp_path / "resnet", "resnet")
    with pytest.raises(ModelError, match=r"batch normalization.*ConvNeXT"):
        trained(recipe_of(tmp_path, model, images, base={"quant": "none"}, adapter={"target_modules": ["convolution"]}))


def test_a_base_without_checkpointing_is_refused(tmp_path: Path, images: dict[str, str]) -> None:
    model = save_tiny_image_model(tmp_path / "convnext", "convnext")
    with pytest.raises(TrainingError, match=r"Set train.gradient_checkpointing=false"):
        trained(recipe_of(tmp_path, model, images, train={"gradient_checkpointing": True}))


def test_a_folder_without_processor_is_refused(tmp_path: Path, vit: Path) -> None:
    with pytest.raises(ModelError, match=r"no processor for AutoImageProcessor.*preprocessor_config.json"):
        load_processor(tmp_path, "AutoImageProcessor")


def test_without_pillow_the_extra_is_named(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModelError, match=r"pip install 'qlora-kit\[vision\]'"):
        load_processor(vit, "AutoImageProcessor")
