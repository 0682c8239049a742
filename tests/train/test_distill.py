"""Distillation in a run: what it learns, its cache, its resume, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer
from tiny_runs import adapter_sha256, resume_here, tiny_recipe, train_here, unfinish
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base
from qlora_kit.tasks.head import head_gives_logits, hidden_of_loss_tokens
from qlora_kit.tasks.loss import token_losses
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import start_session

PLAIN = {"adapter": {"dropout": 0.0}}


def distilled(folder: Path, model: Path, name: str = "tiny", **distill: Any) -> RunFolder:
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(folder, model, run={"name": name}, train={"distill": distill}, **PLAIN)
    return train_here(recipe)


def train_losses(run: RunFolder) -> list[float]:
    return [record["loss"] for record in run.metrics() if record["kind"] == "train"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def scaled_model(arch: str) -> Any:
    """A model whose logits are its head's times a factor of its config."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    factor = {"cohere": {"logit_scale": 0.0625}, "granite": {"logits_scaling": 8.0}}[arch]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes, **heads, **factor)).eval()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gpt_neox", "cohere", "granite"])
def test_hidden_states_give_the_same_losses_through_the_head(arch: str) -> None:
    model = scaled_model(arch) if arch in ("cohere", "granite") else tiny_model(arch)
    ids = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    hidden, kept = hidden_of_loss_tokens(model, batch)
    through_head = torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden), kept, reduction="none")
    losses, placed = token_losses(model, batch)
    torch.testing.assert_close(through_head, losses[placed != -100], rtol=1e-5, atol=1e-5)


def test_a_teacher_alone_pulls_the_student_to_itself(tmp_path: Path, model: Path) -> None:
    teacher = save_tiny_model(tmp_path / "teacher", seed=3)
    losses = train_losses(distilled(tmp_path, model, teacher=str(teacher), weight=1.0, temperature=1.0))
    assert losses[-1] < 0.9 * losses[0]


def test_the_first_loss_is_the_distance_of_base_and_quantized_base(tmp_path: Path, model: Path) -> None:
    run = distilled(tmp_path, model, weight=1.0, temperature=1.0)
    source = find_base(str(model))
    with torch.no_grad():
        session = start_session(run.recipe(), run)
        rows = [session.batches.next_micro_batch() for _ in range(2)]
        expected, tokens = 0.0, 0
        for batch in map(session.collate, rows):
            carries = batch["labels"][:, 1:] != -100
            theirs, ours = (
                load_base(source, quant, compute_dtype=torch.float32)(batch["input_ids"], batch["attention_mask"])
                .logits[:, :-1][carries]
                .log_softmax(-1)
                for quant in ("none", "nf4")
            )
            expected += (theirs.exp() * (theirs - ours)).sum().item()
            tokens += int(carries.sum())
    assert train_losses(run)[0] == pytest.approx(expected / tokens, rel=1e-4)


def test_words_kept_on_disk_train_as_words_said_at_each_step(tmp_path: Path, model: Path) -> None:
    asked = distilled(tmp_path / "a", model)
    kept = distilled(tmp_path / "b", model, top_k=320)  # the whole vocabulary, float16
    assert train_losses(kept) == pytest.approx(train_losses(asked), rel=2e-3)
    few = distilled(tmp_path / "c", model, top_k=5)
    with safe_open(few.teacher, framework="pt") as file:
        assert file.get_slice("log_probs").get_shape() == file.get_slice("ids").get_shape()
        assert file.get_slice("ids").get_shape()[1] == 5
        assert json.loads(file.metadata()["settings"])["top_k"] == 5
    told = [" ".join(run.manifest()["notes"]) for run in (kept, few)]
    assert "likeliest tokens hold" not in told[0] and "5 likeliest tokens hold" in told[1]


@pytest.mark.parametrize("options", [{}, {"top_k": 8}], ids=["asked", "kept"])
def test_a_resume_ends_in_the_same_bytes(tmp_path: Path, model: Path, options: dict[str, Any]) -> None:
    run = distilled(tmp_path, model, **options)
    expected = adapter_sha256(run.path)
    unfinish(run)
    shutil.rmtree(run.checkpoints / "step-000006")
    run.update_manifest(checkpoint=4, step=4)
    run.teacher.unlink(missing_ok=True)  # asked again
    resume_here(run)
    assert adapter_sha256(run.path) == expected
    assert run.teacher.exists() == bool(options)


def test_words_that_are_there_are_not_asked_for_again(tmp_path: Path, model: Path) -> None:
    run = distilled(tmp_path, model, top_k=8)
    unfinish(run)
    before = run.teacher.stat().st_mtime_ns
    resume_here(run)
    assert run.teacher.stat().st_mtime_ns == before


def test_a_trained_head_and_micro_batches_learn_too(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        model,
        adapter={"dropout": 0.0, "modules_to_save": ["lm_head"]},
        train={"distill": {"weight": 0.5}, "grad_accum_steps": 3, "gradient_checkpointing": True},
    )
    losses = train_losses(train_here(recipe))
    assert losses[-1] < losses[0]


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path, model: Path) -> None:
    teacher = save_tiny_model(tmp_path / "teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ModelError, match=r"has other tokens than .*321 tokens.*the same 320 tokens"):
        distilled(tmp_path, model, teacher=str(teacher))
    assert not (tmp_path / "runs" / "tiny" / "recipe.yaml").exists()


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelError, match=r"train\.distill\.teacher names no model .*nowhere"):
        distilled(tmp_path, model, teacher=str(tmp_path / "nowhere"))


def test_logits_bent_behind_the_head_are_refused(tmp_path: Path) -> None:
    bent = save_tiny_model(tmp_path / "gemma2", "gemma2")
    with pytest.raises(ModelError, match="cannot take Gemma2ForCausalLM: it changes what its output head gives"):
        distilled(tmp_path, bent)


class Capped(LlamaForCausalLM):
    """Its config does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 50 * torch.tanh(output.logits / 50)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_behind_the_head_is_measured(dtype: torch.dtype) -> None:
    for arch in ("llama", "gpt2", "phi"):  # phi's head has a bias
        assert head_gives_logits(tiny_model(arch).to(dtype))
    assert all(head_gives_logits(scaled_model(arch).to(dtype)) for arch in ("cohere", "granite"))
    biased = scaled_model("granite").to(dtype)
    biased.lm_head.bias = torch.nn.Parameter(torch.ones(320, dtype=dtype))
    capped = Capped(tiny_config("llama")).to(dtype)
    headless = tiny_model("llama").model.to(dtype)
    assert not any(head_gives_logits(model) for model in (biased, capped, tiny_model("gemma2").to(dtype), headless))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    head, before = model.lm_head, torch.get_rng_state()
    assert head_gives_logits(model)
    assert model.training and model.lm_head is head and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter": {"new_tokens": ["<a>"]}}, "train.distill cannot be had with adapter.new_tokens"),
        ({"data": {"streaming": True}}, "train.distill.top_k needs rows that are read first"),
        ({"train": {"distill": {"temperature": 0}}}, "train.distill.temperature"),
        ({"train": {"distill": {"weight": 1.5}}}, "train.distill.weight"),
        ({"train": {"distill": {"teachr": "x"}}}, "train.distill.teachr: unknown key"),
    ],
)
def test_fields_that_do_not_agree(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    changes = {"train": {"distill": {"top_k": 4}}, **changes}
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(tmp_path, tmp_path / "model", **changes)


@pytest.mark.parametrize("widths", [(320, 352), (352, 320)], ids=["teacher wider", "student wider"])
@pytest.mark.parametrize("options", [{}, {"top_k": 8}], ids=["asked", "kept"])
def test_embeddings_padded_to_another_width_are_no_other_tokens(
    tmp_path: Path, widths: tuple[int, int], options: dict[str, Any]
) -> None:
    student = save_tiny_model(tmp_path / "student", vocab_size=widths[0])
    teacher = save_tiny_model(tmp_path / "teacher", vocab_size=widths[1], seed=3)
    losses = train_losses(distilled(tmp_path, student, teacher=str(teacher), **options))
    assert all(0 < loss < 20 for loss in losses)


def test_more_ids_than_there_are_tokens_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ModelError, match=r"train.distill.top_k \(got 321\). Allowed: 1 to 320"):
        distilled(tmp_path, model, top_k=321)
    assert not (tmp_path / "runs" / "tiny" / "recipe.yaml").exists()
