"""What stops a run, what it publishes, and what it tells."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    RISING,
    ForkedCli,
    tiny_recipe,
    tiny_tree,
    train_here,
    write_gibberish,
    write_recipe,
)

from qlora_kit.data.collate import collate
from qlora_kit.data.dataset import prepare
from qlora_kit.errors import TrainingError
from qlora_kit.generate import generate_ids
from qlora_kit.tasks.loss import row_losses
from qlora_kit.train.loop import LOWEST_LOSS_SCALE, train_step
from qlora_kit.train.loss_scale import GROWTH_INTERVAL, LossScale
from qlora_kit.train.optim import lr_at
from qlora_kit.train.restore import load_run_tokenizer, load_tuned
from qlora_kit.train.resume import begin, resume_from_checkpoint
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.saving import save
from qlora_kit.train.session import Session, start_session


def poisoned(model: Path, folder: Path, token: int | None) -> Path:
    """A copy of an untied model with NaN in the last norm, or in the embedding of one token."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    if token is None:
        tensors["model.norm.weight"][0] = math.nan
    else:
        tensors["model.embed_tokens.weight"][token, 3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_rows(tmp_path: Path, tiny_qwen: Path) -> None:
    model = poisoned(tiny_qwen, tmp_path / "nan", token=None)
    with pytest.raises(TrainingError, match=r"step 1: loss nan .* rows: \S+train\.jsonl row \d+, .*Lower train\.lr"):
        train_here(tiny_recipe(tmp_path, model))
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert run.manifest()["status"] == "failed" and run.metrics() == []
    assert not run.checkpoints.exists() and not run.adapter.exists()


def test_of_a_batch_only_the_row_that_is_wrong_is_named(tmp_path: Path, tiny_qwen: Path) -> None:
    from tiny_models import tiny_tokenizer

    (token,) = tiny_tokenizer()("~")["input_ids"]
    model = poisoned(tiny_qwen, tmp_path / "nan", token=token)
    tree = tiny_tree(tmp_path, model, base={"quant": "none"}, train={"max_steps": 30})
    rows = Path(tree["data"]["train"]).read_text().splitlines()
    rows[16] = json.dumps({"prompt": "stone ~", "completion": "river"})
    Path(tree["data"]["train"]).write_text("\n".join(rows))
    process = ForkedCli(tmp_path / "out", "train", write_recipe(tmp_path, tree), "--json")
    assert process.wait() == 4
    message = json.loads(process.out.splitlines()[-1])
    assert message["error"] == "TrainingError"
    assert message["message"].count("train.jsonl row") == 1 and "train.jsonl row 17." in message["message"]
    assert RunFolder(tmp_path / "runs" / "tiny").manifest()["status"] == "failed"


def fp16_session(folder: Path, model: Path, scale: float) -> Session:
    recipe = tiny_recipe(folder, model, base={"compute_dtype": "fp16"})
    session = start_session(recipe, RunFolder(folder / "unused"))
    session.scaler = LossScale(True, scale)
    return session


def weights(session: Session) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in session.optimizer.parameters.items()}


def test_an_fp16_overflow_skips_the_step_halves_the_scale_and_goes_on(tmp_path: Path, tiny_llama: Path) -> None:
    session = fp16_session(tmp_path, tiny_llama, 2.0**60)
    before = weights(session)
    skipped = train_step(session, 1)
    assert skipped.skipped and skipped.loss_scale == 2.0**60 and math.isfinite(skipped.loss)
    assert session.scaler.factor == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in weights(session).items())
    assert session.optimizer.state()[1] == {} and not any("exp_avg" in key for key in session.optimizer.state()[0])
    session.scaler = LossScale(True, 1024.0)
    done = train_step(session, 2)
    assert not done.skipped and done.loss_scale == 1024.0
    assert any(not torch.equal(value, before[name]) for name, value in weights(session).items())


def test_a_resume_goes_on_with_the_loss_scale_that_was_found(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_llama, base={"compute_dtype": "fp16"})
    run = RunFolder.create(recipe)
    run.path.mkdir(parents=True)
    session = start_session(recipe, run)
    session.scaler = LossScale(True, 2.0**60)
    state = begin(session)
    train_step(session, 1)
    state.step = 1
    save(session, state)
    resumed = start_session(recipe, run)
    assert resume_from_checkpoint(resumed).step == 1
    assert resumed.scaler.state_dict() == session.scaler.state_dict()
    assert resumed.scaler.factor == 2.0**59


def test_the_loss_scale_doubles_after_many_good_steps_and_halves_after_a_bad_one() -> None:
    scale = LossScale(True)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(overflow=False)
    again = LossScale(True)
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    again.update(overflow=False)
    assert (scale.factor, again.factor) == (2.0**16, 2.0**17)
    scale.update(overflow=True)
    scale.update(overflow=False)
    assert scale.state_dict() == {"scale": 2.0**15, "good_steps": 1}, "good steps are counted in a row"


def test_without_fp16_the_loss_and_gradients_are_left_alone() -> None:
    scale, parameter = LossScale(False), torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    scale.unscale([parameter])
    scale.update(overflow=True)
    assert parameter.grad.item() == scale.scaled(torch.ones(1)).item() == 1.0
    assert scale.factor is None and scale.state_dict() == {}


def test_gradients_that_overflow_at_any_scale_stop_the_run(tmp_path: Path, tiny_llama: Path) -> None:
    session = fp16_session(tmp_path, tiny_llama, LOWEST_LOSS_SCALE / 2)
    next(iter(session.optimizer.parameters.values())).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: loss .* and gradient norm (inf|nan) are not finite"):
        train_step(session, 1)


def test_unscaled_fp16_gradients_are_those_of_fp32(tmp_path: Path, tiny_llama: Path) -> None:
    norms = []
    for dtype in ("fp16", "fp32"):
        recipe = tiny_recipe(tmp_path, tiny_llama, base={"compute_dtype": dtype}, adapter={"dropout": 0.0})
        norms.append(train_step(start_session(recipe, RunFolder(tmp_path / "unused")), 1).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_an_overflow_is_in_the_metrics_as_json_that_any_reader_takes(tmp_path: Path, tiny_llama: Path) -> None:
    """The first steps of fp16 may overflow; JSON has no word for infinity."""
    run = train_here(tiny_recipe(tmp_path, tiny_llama, base={"compute_dtype": "fp16"}, train={"max_steps": 2}))

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=no_constants) for line in run.metrics_file.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all((line["grad_norm"] is None) == line["skipped"] and line["loss_scale"] > 0 for line in steps)


def held_out_loss(run: RunFolder) -> float:
    """Of the published adapter, on all held-out rows, one at a time."""
    recipe, model, tokenizer = run.recipe(), load_tuned(run), load_run_tokenizer(run)
    rows = prepare(recipe.data, tokenizer, recipe.run.seed).eval
    found = [row_losses(model, collate([row], tokenizer.pad_token_id)) for row in rows]
    return sum(loss.item() for loss, _ in found) / sum(int(tokens) for _, tokens in found)


@pytest.mark.parametrize("eval_batches", [None, 1])
def test_stops_early_and_publishes_scores_and_samples_the_best_step(
    tmp_path: Path, tiny_llama: Path, eval_batches: int | None
) -> None:
    write_gibberish(tmp_path / "eval.jsonl")
    train = {**RISING, "max_steps": 30, "early_stopping_patience": 2, "eval_batches": eval_batches}
    run = train_here(tiny_recipe(tmp_path, tiny_llama, train=train, eval={"samples": 2, "max_new_tokens": 6}))
    manifest, evals = run.manifest(), [record for record in run.metrics() if record["kind"] == "eval"]
    best = min(evals, key=lambda record: record["loss"])["step"]
    results = manifest["results"]
    assert results["stopped_early"] and results["best_step"] == manifest["adapter"]["step"] == best
    assert manifest["step"] == evals[-1]["step"] == best + 4 < 30
    kept = run.checkpoints / f"step-{best:06d}" / "adapter" / "adapter_model.safetensors"
    assert kept.read_bytes() == (run.adapter / kept.name).read_bytes()
    assert results["final_eval_loss"] == pytest.approx(held_out_loss(run), rel=1e-5)
    model, tokenizer = load_tuned(run), load_run_tokenizer(run)
    for sample in json.loads((run.path / "samples.json").read_text()):
        turn = sample["prompt"].split("\n")[1]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        answer = generate_ids(model, tokenizer, ids, 6)
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_without_eval_every_the_end_is_evaluated(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tiny_recipe(
        tmp_path, tiny_llama, train={"eval_every": None, "eval_batches": None, "early_stopping_patience": None}
    )
    run = train_here(recipe)
    evals = [record for record in run.metrics() if record["kind"] == "eval"]
    assert [(record["step"], record["best"]) for record in evals] == [(6, True)]
    results = run.manifest()["results"]
    assert results["final_eval_loss"] == evals[0]["loss"] == pytest.approx(held_out_loss(run), rel=1e-5)
    assert not results["stopped_early"]


def test_patience_that_ends_with_the_last_step_is_no_early_stop(tmp_path: Path, tiny_llama: Path) -> None:
    write_gibberish(tmp_path / "eval.jsonl")
    run = train_here(tiny_recipe(tmp_path, tiny_llama, train={**RISING, "early_stopping_patience": 2}))
    results = run.manifest()["results"]
    assert run.manifest()["step"] == results["best_step"] + 4 == 8 and not results["stopped_early"]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 8), (0.5, 4), (2.0, 15), (0.01, 1)])
def test_epochs_are_counted_in_steps(tmp_path: Path, tiny_llama: Path, epochs: float, steps: int) -> None:
    """30 rows, 4 a step."""
    recipe = tiny_recipe(tmp_path, tiny_llama, train={"max_steps": None, "epochs": epochs})
    assert start_session(recipe, RunFolder(tmp_path / "unused")).total_steps == steps


def test_metrics_hold_the_schedule_with_its_warm_up_and_each_row_once(tmp_path: Path, tiny_llama: Path) -> None:
    train = {"warmup_steps": 3, "schedule": "linear", "max_steps": None, "epochs": 2.0, "log_every": 2}
    run = train_here(tiny_recipe(tmp_path, tiny_llama, train=train))
    steps = [record for record in run.metrics() if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 10, 12, 14, 15], "every second, and the last"
    assert [record["lr"] for record in steps] == [lr_at(r["step"], 1e-2, "linear", 3, 15) for r in steps]
    assert all(0 < r["loss_tokens"] < r["tokens"] and r["tokens_per_s"] > 0 and r["rss_bytes"] > 0 for r in steps)


def test_too_little_memory_for_samples_does_not_lose_the_run(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> list[int]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("qlora_kit.train.samples.generate_ids", no_memory)
    run = train_here(tiny_recipe(tmp_path, tiny_llama, eval={"samples": 2}))
    manifest = run.manifest()
    assert manifest["status"] == "finished" and manifest["adapter"]["sha256"]
    assert "no samples: too little memory to generate" in manifest["notes"]


def test_what_averages_gradients_is_gone_before_the_group_of_processes(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it waits for the group's thread with Python's lock in hand, and now and then for ever."""
    recipe = tiny_recipe(tmp_path, tiny_llama)
    session = start_session(recipe, RunFolder.create(recipe))
    wrapper = torch.nn.Sequential(session.plain)
    wrapper.itself = [wrapper]  # as DistributedDataParallel: only the garbage collector finds it
    session.model, left = wrapper, weakref.ref(wrapper)
    session.accelerator._models.append(wrapper)
    del wrapper
    seen = []
    monkeypatch.setattr(session.accelerator, "end_training", lambda: seen.append(left()))
    session.end()
    assert seen == [None]
