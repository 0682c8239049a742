"""`plan --budget`: the variant that is found fits, trains on the same rows, and says what it gave up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned_models import recipe_of

from qlora_kit.cli import main
from qlora_kit.errors import TrainingError
from qlora_kit.plan.budget import fitting, must_fit, plan_recipe
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import load_recipe
from qlora_kit.train.planned import refuse_what_cannot_fit

MIB = 2**20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "torch_dtype": "float32",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path / "base"


def recipe_on(base: Path, **train: Any) -> Recipe:
    train = {"max_steps": 1, "micro_batch_size": 8, "gradient_checkpointing": False, **train}
    return recipe_of(base={"model": str(base)}, data={"train": "t", "max_seq_len": 512}, train=train)


def test_a_budget_that_is_ample_changes_nothing(base: Path) -> None:
    found = must_fit(recipe_on(base), 2**40, "cpu")
    assert found.recipe == recipe_on(base) and found.changes == [] and found.overrides == []
    assert found.time_against == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.45, 0.3])
def test_what_is_found_fits_and_keeps_the_rows_of_a_step(base: Path, share: float, device: Any) -> None:
    recipe = recipe_on(base)
    budget = int(share * plan_recipe(recipe, device).total_bytes)
    found = must_fit(recipe, budget, device)
    assert plan_recipe(found.recipe, device).total_bytes == found.plan.total_bytes <= budget
    train = found.recipe.train
    assert train.micro_batch_size * train.grad_accum_steps == 8
    assert {key for key, *_ in found.changes} == {override.split("=")[0] for override in found.overrides}


def test_less_memory_takes_more_time(base: Path) -> None:
    recipe = recipe_on(base)
    whole = plan_recipe(recipe, "cuda").total_bytes
    times = [must_fit(recipe, int(share * whole), "cuda").time_against for share in (1.0, 0.7, 0.4, 0.3)]
    assert times == sorted(times) and times[0] == 1 < times[-1]


def test_inputs_go_to_the_host_before_rows_are_shortened(base: Path) -> None:
    recipe = recipe_on(base, micro_batch_size=1, gradient_checkpointing=True)
    long, alone = {"max_seq_len": 16384}, {"batch_size": 1}
    sections = {"data": recipe.data.model_copy(update=long), "eval": recipe.eval.model_copy(update=alone)}
    recipe = recipe.model_copy(update=sections)
    budget = plan_recipe(recipe, "cuda").total_bytes - 200 * MIB
    found = must_fit(recipe, budget, "cuda")
    (change,) = [change for change in found.changes if change[0] == "train.gradient_checkpointing"]
    assert change[1:3] == (True, "offload") and change[3] > 200 * MIB
    assert "train.gradient_checkpointing=offload" in found.overrides and 1 < found.time_against < 1.1
    assert found.recipe.data.max_seq_len == 16384 and found.plan.host_bytes >= 12 * 16384 * 1024 * 2
    on_cpu = must_fit(recipe, plan_recipe(recipe, "cpu").total_bytes - 200 * MIB, "cpu")
    assert on_cpu.recipe.train.gradient_checkpointing is True, "there it would buy nothing"


def test_embeddings_go_to_the_host_where_the_head_is_its_own(base: Path) -> None:
    recipe = recipe_on(base, micro_batch_size=1, gradient_checkpointing=True)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"batch_size": 1})})
    budget = plan_recipe(recipe, "cuda").total_bytes - 60 * MIB
    found = must_fit(recipe, budget, "cuda")
    assert [change[:3] for change in found.changes] == [("base.embeddings", "device", "host")]
    assert found.changes[0][3] == 32000 * 1024 * 2 == found.plan.host_bytes and 1 < found.time_against < 1.02
    tied = base.parent / "tied"
    tied.mkdir()
    (tied / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}), encoding="utf-8")
    for on, device in ((tied, "cuda"), (base, "cpu")):
        recipe = recipe_on(on, micro_batch_size=1, gradient_checkpointing=True)
        least: Any = must_fit(recipe, plan_recipe(recipe, device).total_bytes - 8 * MIB, device)
        assert least.recipe.base.embeddings == "device"


def test_bits_go_before_length(base: Path) -> None:
    recipe = recipe_on(base).model_copy(update={"base": recipe_of(base={"model": str(base), "quant": "none"}).base})
    least = must_fit(recipe, plan_recipe(recipe, "cuda").exact_bytes - MIB, "cuda").recipe
    assert least.base.quant != "none" and least.data.max_seq_len == 512


def test_a_frozen_head_is_coded_before_the_base_or_the_length_suffers(base: Path) -> None:
    recipe = recipe_on(base, micro_batch_size=1, gradient_checkpointing="offload")
    sections = {"eval": recipe.eval.model_copy(update={"batch_size": 1})}
    sections["base"] = recipe.base.model_copy(update={"embeddings": "host"})  # nothing is left that costs time alone
    recipe = recipe.model_copy(update=sections)
    found = must_fit(recipe, plan_recipe(recipe, "cuda").total_bytes - 8 * MIB, "cuda")
    assert ("base.head_quant", "none", "int8") in [change[:3] for change in found.changes]
    assert "base.head_quant=int8" in found.overrides and found.recipe.data.max_seq_len == 512
    for adapter in ({"modules_to_save": ["lm_head"]}, {"new_tokens": ["<x>"]}):
        on_device = recipe.base.model_copy(update={"embeddings": "device"})
        trained = recipe.model_copy(update={"adapter": recipe_of(adapter=adapter).adapter, "base": on_device})
        smaller = fitting(trained, plan_recipe(trained, "cuda").total_bytes - 8 * MIB, "cuda")
        assert smaller is None or smaller.recipe.base.head_quant == "none"


def test_an_evaluation_that_takes_most_gets_fewer_rows_at_once(base: Path) -> None:
    recipe = recipe_on(base, micro_batch_size=1)
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"batch_size": 64})})
    assert plan_recipe(recipe, "cpu").highest.name == "evaluation"
    found = must_fit(recipe, plan_recipe(recipe, "cpu").total_bytes - MIB, "cpu")
    assert [(key, after) for key, _, after, _ in found.changes] == [("eval.batch_size", 1)]
    assert found.changes[0][3] > MIB


def test_a_budget_that_nothing_fits(base: Path) -> None:
    assert fitting(recipe_on(base), 50 * MIB, "cpu") is None
    with pytest.raises(TrainingError, match=r"no variant of this recipe fits into 50\.0 MiB.*are stored.*smaller base"):
        must_fit(recipe_on(base), 50 * MIB, "cpu")


def test_the_command_says_what_it_gave_up_and_writes_the_recipe(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fits.yaml"
    words = ["smollm2-sentiment", f"base.model={base}", "train.micro_batch_size=16", "data.max_seq_len=1024"]
    assert main(["plan", *words, "--budget", "900MiB", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Fits into 900MiB, with these changes:" in said and "train.micro_batch_size: 16 -> " in said
    assert "A token takes about" in said
    assert plan_recipe(load_recipe(str(out)), "cpu").total_bytes <= 900 * MIB
    assert main(["plan", *words, "--budget", "900MiB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total_bytes"] <= 900 * MIB and any(o.startswith("train.micro_batch_size=") for o in told["overrides"])


def test_a_budget_that_is_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "smollm2-sentiment", "--budget", "8GB"])
    assert stopped.value.code == 2 and "8GB is no size; write for example 8GiB" in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_with_the_plans_advice(base: Path) -> None:
    recipe = recipe_on(base)
    plan = plan_recipe(recipe, "cpu")
    refuse_what_cannot_fit(recipe, plan, plan.total_bytes)
    with pytest.raises(TrainingError, match=r"would take .* are free on this machine's cpu.*Set train\..*--anyway"):
        refuse_what_cannot_fit(recipe, plan, plan.total_bytes // 2)
    with pytest.raises(TrainingError, match=r"Take a smaller base, free some memory"):
        refuse_what_cannot_fit(recipe, plan, 50 * MIB)
    refuse_what_cannot_fit(recipe, None, 0)  # of a model that the plan does not know nothing is said
