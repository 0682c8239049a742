"""What `plan` says of loading a base whole, against what PiSSA and LoftQ really hold at once."""

from __future__ import annotations

import json
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_models import LLAMA, recipe_of
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.adapters.methods import METHODS
from qlora_kit.adapters.settings import SETTINGS
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base
from qlora_kit.plan import plan, print_plan
from qlora_kit.recipe import Recipe

WIDE = LLAMA | {"hidden_size": 320, "intermediate_size": 700, "num_hidden_layers": 1, "tie_word_embeddings": False}
CONFIG = WIDE | {"model_type": "llama"}


def recipe_for(method: str, **base: Any) -> Recipe:
    return recipe_of(base={"model": "tiny", **base}, adapter={"method": method, "rank": 4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE)).save_pretrained(path)
    return path


def most_allocated(action: Any) -> int:
    """Bytes that the action had allocated at most, less what it freed of what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    profiled: Any = profiler.profiler
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_it_is_what_is_held_at_most(method: str, folder: Path) -> None:
    recipe = recipe_for(method)
    model = load_base(find_base(str(folder)), "nf4", quantize_later=True)
    found = plan(recipe, CONFIG)
    whole, layer = found.loading
    assert whole.exact and whole.bytes == sum(parameter.nbytes for parameter in model.parameters())
    most = most_allocated(lambda: METHODS[method](recipe.adapter).inject(model))
    assert 0.7 < layer.bytes / most < 1.4
    assert 0.8 < found.loading_bytes / (whole.bytes + most) < 1.25


@pytest.mark.parametrize("calibration", ["diagonal", "full"])
def test_moments_of_inputs_are_counted(calibration: str) -> None:
    adapter = {"method": "loftq", "rank": 4, "calibration_rows": 8, "calibration": calibration}
    moments = plan(recipe_of(base={"model": "tiny"}, adapter=adapter), CONFIG).loading[-1]
    inputs = [320] * 5 + [160, 700]  # of q, k, v, gate and up; of o; of down
    assert moments.name == "moments of inputs" and not moments.exact
    assert moments.bytes == 4 * sum(width ** (2 if calibration == "full" else 1) for width in inputs)


def test_the_total_is_that_of_loading_where_it_takes_more() -> None:
    small = {"data": {"train": "t.jsonl", "max_seq_len": 8}}
    found = plan(recipe_of(base={"model": "tiny"}, adapter={"method": "pissa", "rank": 1}, **small), CONFIG)
    assert found.total_bytes == found.loading_bytes > found.training_bytes
    tree = json.loads(json.dumps(found.to_json()))
    assert [part["name"] for part in tree["loading"]] == ["base, whole", "one layer decomposed"]
    assert tree["loading_bytes"] == tree["total_bytes"] == sum(part["bytes"] for part in tree["loading"])
    console = Console(file=StringIO(), width=140)
    print_plan(found, console)
    assert isinstance(console.file, StringIO)
    assert (
        "one layer decomposed" in console.file.getvalue() and "of loading, which takes more" in console.file.getvalue()
    )


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_other_methods_load_it_quantized(method: str) -> None:
    found = plan(recipe_for(method), CONFIG)
    assert found.loading == [] and found.loading_bytes == 0
    assert found.total_bytes == found.training_bytes


def test_the_settings_say_what_the_methods_do() -> None:
    assert {name: kind.loads_whole for name, kind in SETTINGS.items()} == {
        name: method.replaces_base for name, method in METHODS.items()
    }
