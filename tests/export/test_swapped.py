"""One base and several adapters beside it, swapped at run time: each is the model that was trained, to 1e-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as og
import pytest
import torch
from adapter_folders import adapter
from qlora_runtime import Bundle, Sampling
from qlora_runtime.cli import main as runtime
from qlora_runtime.errors import ArgumentError
from qlora_runtime.generate import generate
from qlora_runtime.session import read_adapter
from runtime.serving import COMPLETION, serving
from tiny_models import save_tiny_model, tiny_ids
from tiny_run import train, write_recipe

from qlora_kit.cli import main
from qlora_kit.data.template import stop_token_ids
from qlora_kit.export.linear import Linear
from qlora_kit.export.parameters import Rows
from qlora_kit.export.swapped import Adapted, swapped_forms
from qlora_kit.model.load import to_reference
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.train.restore import load_run_base, load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder


@pytest.fixture(scope="module", params=["nf4", "none", pytest.param("int4", marks=pytest.mark.slow)])
def swapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """(a run whose base and adapter are shipped with three adapters more, their folder)."""
    folder = tmp_path_factory.mktemp(f"swapped-{request.param}")
    recipe = write_recipe(folder, save_tiny_model(folder / "model"), base={"quant": request.param})
    run = train(recipe)
    base = RunFolder.open(run).recipe().base.model
    adapter(folder / "small", 1, rank=2, target_modules=["q_proj", "down_proj"], base=base)
    adapter(folder / "large", 2, rank=7, use_rslora=True, base=base)
    adapter(folder / "dora", 3, method="dora", rank=3, target_modules=["v_proj", "o_proj", "up_proj"], base=base)
    given = f"{folder / 'small'},big={folder / 'large'},{folder / 'dora'}"
    assert main(["export", str(run), "--adapters", given]) == 0
    return RunFolder.open(run), folder


def trained(run: RunFolder, place: Path | None) -> np.ndarray:
    model: Any = load_run_base(run) if place is None else load_tuned(run, adapter=place)
    with torch.no_grad():
        found: np.ndarray = to_reference(model.eval())(tiny_ids()).logits.numpy()
    return found


def test_each_adapter_is_its_own_model_and_none_is_the_base(swapped: tuple[RunFolder, Path]) -> None:
    run, folder = swapped
    bundle = Bundle.open(run.bundles / "adapters")
    assert bundle.manifest.adapters == ["big", "dora", "small", "tiny"]
    assert bundle.manifest.model.eos_token_ids == tuple(stop_token_ids(load_run_tokenizer(run)))
    places = {name: folder / name for name in ("small", "dora")} | {"big": folder / "large", "tiny": run.adapter}
    for name in (None, "small", "big", "dora", "tiny", None, "small"):  # one session, any order
        found = bundle.with_adapter(name).logits(tiny_ids().numpy())
        np.testing.assert_allclose(found, trained(run, places.get(name)), rtol=0, atol=1e-3)
    assert np.abs(bundle.logits(tiny_ids().numpy()) - bundle.with_adapter("big").logits(tiny_ids().numpy())).max() > 0.1
    proof = json.loads((run.bundles / "adapters/manifest.json").read_text())["verification"]
    assert proof["passed"] and set(proof["distances"]["adapters"]) == {"big", "dora", "small", "tiny"}
    assert all(found["max_logit"] < 1e-3 for found in proof["distances"]["adapters"].values())
    quantized = run.recipe().base.quant != "none"
    assert proof["distances"]["identical_codes"] == (count_quantized(run) if quantized else None)


def count_quantized(run: RunFolder) -> int:
    return sum(isinstance(module, QuantizedLinear) for module in load_run_base(run).modules())


def test_layers_of_one_input_have_one_branch(swapped: tuple[RunFolder, Path]) -> None:
    run, _ = swapped
    graph = onnx.load(run.bundles / "adapters/onnx/model.onnx", load_external_data=False).graph
    inputs = [value.name for value in graph.input if value.name.endswith(".lora_A")]
    layers = load_run_base(run).config.num_hidden_layers
    assert len(inputs) == layers * (7 if run.recipe().base.quant == "nf4" else 4)  # qkv, o, gate and up, down
    scaled = [value.name for value in graph.input if value.name.endswith(".row_scale")]
    assert len(scaled) == layers * 3  # only where DoRA is


def test_layers_share_a_branch_where_that_saves_more_than_its_zeros_cost() -> None:
    def packs(rank: int, *outputs: int) -> bool:
        rows = [Rows(f"{count}-{place}.weight", 0, count) for place, count in enumerate(outputs)]
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        adapted = {of.layer: Adapted(rank, scaled=False) for of in rows}
        return swapped_forms({}, adapted, {}).packs([Linear(node, (of,)) for of in rows])

    assert packs(16, 576, 192, 192)  # SmolLM2's q, k and v
    assert packs(16, 1536, 1536) and not packs(32, 1536, 1536)  # its gate and up
    assert packs(0, 11008, 11008) and not packs(8, 4096, 4096, 4096)  # Llama 7B's


def test_the_runner_answers_and_verifies(
    swapped: tuple[RunFolder, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(swapped[0].bundles / "adapters")
    told = {}
    for name in ("", "big", "small"):
        capsys.readouterr()
        more = ["--adapter", name] if name else []
        assert runtime(["generate", place, "--prompt", "a film", "--max-new-tokens", "24", *more]) == 0
        told[name] = capsys.readouterr().out
    assert len(set(told.values())) == 3
    with pytest.raises(ArgumentError, match="has no adapter 'none'; it has big, dora, small, tiny"):
        Bundle.open(place).with_adapter("none")
    assert runtime(["verify", place]) == 0
    weights = Path(place) / "adapters/small/adapter.onnx_adapter"
    whole = weights.read_bytes()
    weights.write_bytes((Path(place) / "adapters/big/adapter.onnx_adapter").read_bytes())
    assert runtime(["verify", place]) == 1
    assert "was cut, changed, or is a file of another bundle" in capsys.readouterr().out
    weights.write_bytes(whole)


def test_genai_answers_the_same_with_each_and_with_none(swapped: tuple[RunFolder, Path]) -> None:
    place, ids = swapped[0].bundles / "adapters", tiny_ids()[0].numpy()
    model, bundle = og.Model(str(place)), Bundle.open(place)
    adapters = og.Adapters(model)
    for name in ("small", "big", "dora"):
        adapters.load(str(place / "adapters" / name / "adapter.onnx_adapter"), name)
    for name in ("small", None, "big", "dora", None):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 4)
        generator = og.Generator(model, params)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(ids[None])
        found = generator.get_output("logits").reshape(-1)
        ours = bundle.with_adapter(name)
        expected = ours.logits(ids[None])[0, -1]
        np.testing.assert_allclose(found[-len(expected) :], expected, rtol=0, atol=1e-4)
        while not generator.is_done():
            generator.generate_next_token()
        answer = list(ours.stream(ids, Sampling(max_new_tokens=4)))
        assert generator.get_sequence(0).tolist()[len(ids) :] == answer


def test_what_cannot_be_swapped(
    swapped: tuple[RunFolder, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = swapped
    base = run.recipe().base.model
    for given, words in (
        (adapter(tmp_path / "other", 1), "adapters of different bases"),
        (
            adapter(tmp_path / "table", 1, target_modules=["embed_tokens"], base=base),
            "adapts model.embed_tokens",
        ),
        (adapter(tmp_path / "pissa", 1, method="pissa", base=base), "is a Pissa adapter"),
        (f"tiny={folder / 'small'}", "name of an adapter (got 'tiny')"),
        (f"a/b={folder / 'small'}", "name of an adapter (got 'a/b')"),
        (tmp_path / "nowhere", "no folder"),
    ):
        capsys.readouterr()
        assert main(["export", str(run.path), "--adapters", str(given)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(run.path), "--adapters", str(folder / "small"), "--profiles", "fp32"]) == 2
    assert not list(run.path.glob(".partial*"))


def test_the_server_has_a_model_for_each(swapped: tuple[RunFolder, Path]) -> None:
    place = swapped[0].bundles / "adapters"
    with serving(place, "--name", "base") as server:
        names = [model["id"] for model in server.ask("/v1/models").json()["data"]]
        assert names == ["base", "base:big", "base:dora", "base:small", "base:tiny"]
        for name, adapter_name in (("base:big", "big"), ("base", None), ("base:small", "small"), ("base:big", "big")):
            expected = generate(Bundle.open(place).with_adapter(adapter_name), "a film", Sampling(max_new_tokens=24))
            answer = server.ask(COMPLETION, {"model": name, "prompt": "a film", "max_tokens": 24}).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, expected.text)
        refused = server.ask(COMPLETION, {"model": "base:other", "prompt": "a film"})
        assert (
            refused.status == 404
            and "'base', 'base:big', 'base:dora', 'base:small', 'base:tiny'" in refused.error["message"]
        )


def test_an_adapters_weights_are_the_runners_own(swapped: tuple[RunFolder, Path]) -> None:
    """Older onnxruntime (1.23) frees what it read with the object that read it: using it after that is a crash."""
    file = swapped[0].bundles / "adapters/adapters/small/adapter.onnx_adapter"
    reader = onnxruntime.AdapterFormat.read_adapter(str(file))
    theirs, ours = reader.get_parameters(), read_adapter(file)
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight.numpy(), theirs[name].numpy())
        assert weight._numpy_obj is not None  # of an array that it holds
