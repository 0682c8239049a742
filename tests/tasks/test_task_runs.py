"""Runs of the text tasks on tiny random models: they learn, go on after a kill, and are PEFT's to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_encoders import save_tiny_encoder, task_recipe, tiny_encoder, train_losses, trained
from tiny_models import save_tiny_model
from tiny_run import killed_after
from torch import Tensor, nn

from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import DataError, ModelError
from qlora_kit.model.load import head_modules, load_base
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.source import find_base
from qlora_kit.task_settings import TASKS
from qlora_kit.tasks.registry import task_of
from qlora_kit.tasks.task import without_labels
from qlora_kit.train.adapted_model import architecture_of
from qlora_kit.train.loop import train
from qlora_kit.train.progress import QuietProgress
from qlora_kit.train.restore import load_run_tokenizer, load_tuned, run_task
from qlora_kit.train.run_folder import RunFolder

SETTINGS: dict[str, dict[str, Any]] = {
    "classification": {"type": "classification"},
    "regression": {"type": "regression"},
    "tagging": {"type": "tagging"},
    "question_answering": {"type": "question_answering"},
    "seq2seq": {"type": "seq2seq", "max_target_len": 16},
}
HEADS = {"question_answering": {"qa_outputs"}, "seq2seq": set[str]()}  # others have a classifier


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_encoder(folder / kind, kind) for kind in ("bert", "t5", "bart")}


@pytest.fixture(scope="module", params=SETTINGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> RunFolder:
    """A finished run of each task; only to be read."""
    model = models["t5" if request.param == "seq2seq" else "bert"]
    recipe = task_recipe(tmp_path_factory.mktemp("run"), model, SETTINGS[request.param])
    return trained(recipe)


def eval_batch(run: RunFolder) -> dict[str, Tensor]:
    task, tokenizer = run_task(run), load_run_tokenizer(run)
    return task.collate(list(prepare(run.recipe().data, tokenizer, 0, task).eval), tokenizer)


def restored_loss(run: RunFolder) -> float:
    """The held-out loss of the finished run, loaded again."""
    with torch.no_grad():
        losses, counted = run_task(run).losses(load_tuned(run), eval_batch(run))
    return (losses.sum() / counted.sum()).item()


def outputs(run: RunFolder, model: nn.Module) -> Tensor:
    """Logits on the held-out rows, [batch, n]."""
    batch = eval_batch(run)
    inputs: dict[str, Any] = batch if run.recipe().task.type == "seq2seq" else without_labels(batch)
    with torch.no_grad():
        out = model.eval()(**inputs)
    if "start_logits" in out:
        return torch.cat([out.start_logits, out.end_logits], dim=1)
    return out.logits.flatten(1)


def adapter_bytes(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_the_restored_model_is_the_trained_one(run: RunFolder) -> None:
    task, model = run_task(run), load_tuned(run)
    with torch.no_grad():
        losses, counted = task.losses(model, eval_batch(run))
    assert run.manifest()["results"]["final_eval_loss"] == pytest.approx(
        (losses.sum() / counted.sum()).item(), abs=1e-5
    )


def test_the_base_is_quantized_and_the_head_trained_in_full(run: RunFolder) -> None:
    model, kind = load_tuned(run), run.recipe().task.type
    layers = dict(adapted_layers(model))
    quantized = {name for name, layer in layers.items() if isinstance(layer.base_layer, QuantizedLinear)}
    kept = {name for name in layers if name.endswith(".wo")}  # T5's, which transformers keeps in fp32
    assert quantized and set(layers) - quantized == kept
    assert not [name for name in layers if "head" in name or "classifier" in name or "qa_outputs" in name]
    full = {name.split(".")[0] for name in trainable_parameters(model) if "lora" not in name and "pooler" not in name}
    assert full == HEADS.get(kind, {"classifier"})


def test_peft_loads_the_adapter_and_computes_the_same(run: RunFolder) -> None:
    source, architecture = find_base(run.recipe().base.model), architecture_of(run_task(run))
    ours, theirs = (load_base(source, "none", compute_dtype=torch.float32, architecture=architecture) for _ in "ab")
    untuned = outputs(run, load_base(source, "none", compute_dtype=torch.float32, architecture=architecture))
    load_adapter(ours, run.adapter)
    # Their model inside: the wrapper for questions drops token_type_ids (0.21.2).
    wrapper: Any = PeftModel.from_pretrained(theirs, str(run.adapter))
    expected = outputs(run, wrapper.base_model.model)
    torch.testing.assert_close(outputs(run, ours), expected, atol=1e-5, rtol=0)
    assert (expected - untuned).abs().max() > 0.01


def test_killed_and_resumed_it_ends_in_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    killed = RunFolder(killed_after(run.path, 2, tmp_path / "runs" / "task"))
    recipe = run.recipe()
    moved = recipe.model_copy(update={"run": recipe.run.model_copy(update={"out_dir": str(tmp_path / "runs")})})
    train(moved, killed, QuietProgress(), resume=True)
    assert killed.manifest()["resumes"] == [2]
    assert adapter_bytes(killed) == adapter_bytes(run)


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "full", "bottleneck"])
@pytest.mark.parametrize("kind", ["classification", "tagging", "question_answering", "seq2seq"])
def test_each_method_trains(tmp_path: Path, models: dict[str, Path], method: str, kind: str) -> None:
    model = models["bart" if kind == "seq2seq" else "bert"]
    base = {"quant": "none" if method == "full" else "nf4"}
    changes: dict[str, Any] = {"base": base, "adapter": {"method": method}, "train": {"max_steps": 2}}
    recipe = task_recipe(tmp_path, model, SETTINGS[kind], **changes)
    run = trained(recipe)
    assert all(loss > 0 for loss in train_losses(run)) and len(train_losses(run)) == 2
    assert run.manifest()["results"]["final_eval_loss"] > 0
    task = run_task(run)
    with torch.no_grad():
        losses, counted = task.losses(load_tuned(run), eval_batch(run))
    assert run.manifest()["results"]["final_eval_loss"] == pytest.approx(
        (losses.sum() / counted.sum()).item(), abs=1e-5
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(("quant", "compute_dtype"), [("nf4", "bf16"), ("int8", "fp16")])
def test_encoder_decoders_learn_on_quantized_bases(
    tmp_path: Path, models: dict[str, Path], kind: str, quant: str, compute_dtype: str
) -> None:
    base = {"quant": quant, "compute_dtype": compute_dtype}
    steps = {"max_steps": 16, "lr": 0.02, "gradient_checkpointing": True}
    losses = train_losses(trained(task_recipe(tmp_path, models[kind], SETTINGS["seq2seq"], base=base, train=steps)))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_recomputed_activations_change_no_bit(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    task = SETTINGS["tagging" if kind == "bert" else "seq2seq"]
    runs = [
        trained(
            task_recipe(tmp_path / str(on), models[kind], task, train={"gradient_checkpointing": on, "max_steps": 2})
        )
        for on in (False, True)
    ]
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


def test_long_contexts_train_in_windows(tmp_path: Path, models: dict[str, Path]) -> None:
    data = {"max_seq_len": 20}
    run = trained(task_recipe(tmp_path, models["bert"], {"type": "question_answering", "stride": 4}, data=data))
    counts = run.manifest()["data"]["train"][0]
    assert counts["read"] == 18 and counts["used"] > 18 and counts["longest"] == 20


def test_targets_longer_than_the_decoder_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    task = {"type": "seq2seq", "max_target_len": 97}
    with pytest.raises(DataError, match=r"task.max_target_len is more than the model can say \(got 97\).*2 to 96"):
        trained(task_recipe(tmp_path, models["bart"], task))


def test_decoders_are_refused_for_questions(tmp_path: Path) -> None:
    llama = save_tiny_model(tmp_path / "llama")
    message = (
        r"question_answering cannot be taught to a decoder \(got 'llama'\)\. Allowed: encoders such as BERT.*Take such"
    )
    with pytest.raises(ModelError, match=message):
        trained(task_recipe(tmp_path, llama, SETTINGS["question_answering"]))


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        ("causal_lm", {"model_type": "roberta"}, r"causal_lm cannot.*encoder.*\(got 'roberta'\)\. Allowed: decoders"),
        ("seq2seq", {"model_type": "bert"}, r"seq2seq cannot.*no encoder-decoder \(got 'bert'\)\. Allowed.*T5, BART"),
        ("seq2seq", {"model_type": "llama"}, r"seq2seq cannot.*\(got 'llama'\).*causal_lm, the target as completion"),
    ],
)
def test_bases_of_another_kind_are_refused(task: str, config: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        task_of(TASKS[task].model_validate({})).check_base(config)


def test_the_kind_of_base_is_looked_at_before_its_tokenizer(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"no encoder-decoder \(got 'bert'\)"):
        trained(task_recipe(tmp_path, models["bert"], SETTINGS["seq2seq"]))  # which has no eos_token


@pytest.mark.parametrize("config", [{"model_type": "roberta", "is_decoder": True}, {"model_type": "bart"}, {}])
def test_decoders_and_unknown_kinds_are_let_through(config: dict[str, Any]) -> None:
    task_of(TASKS["causal_lm"].model_validate({})).check_base(config)


def test_the_head_of_a_model_that_holds_the_base_itself() -> None:
    """T5 for questions has encoder and decoder beside its head: they are no part of it, and are not trained in full."""
    assert head_modules(tiny_encoder("t5", "AutoModelForQuestionAnswering")) == ["qa_outputs"]
    assert head_modules(tiny_encoder("bart", "AutoModelForQuestionAnswering")) == ["qa_outputs"]
    assert head_modules(tiny_encoder("bert", "AutoModelForSequenceClassification")) == ["bert.pooler", "classifier"]
