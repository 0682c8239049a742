"""Combined adapters against dense arithmetic and against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from adapter_folders import adapter, logits
from peft.utils import merge_utils
from tiny_models import tiny_model

from qlora_kit.adapters.combine import RULES, Combination, Rule, combine, merge_tensors
from qlora_kit.adapters.deltas import (
    Delta,
    concatenate,
    delta_tensors,
    nearest,
    other_tensors,
    read_deltas,
    read_places,
)
from qlora_kit.adapters.files import write_adapter
from qlora_kit.adapters.peft_config import unscaled_config
from qlora_kit.adapters.peft_format import read_adapter
from qlora_kit.cli import main
from qlora_kit.errors import AdapterError

WEIGHTS = [0.7, 0.4, -0.5]


def random_delta(seed: int, rank: int, out: int = 13, into: int = 9, scaling: float = 1.0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator), scaling)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


THREE = [
    {"x": random_delta(0, 3, scaling=2.0), "y": random_delta(1, 3, 5, 7)},
    {"x": random_delta(2, 4, scaling=0.5)},
    {"x": random_delta(3, 1), "z": random_delta(4, 2)},
]


@pytest.mark.parametrize("rank", [1, 4, 9, 12])
def test_factors_say_what_the_matrix_says(rank: int) -> None:
    delta = random_delta(5, rank, scaling=-1.5)
    u, s, vh = delta.svd()
    close(u @ torch.diag(s) @ vh, delta.dense())
    close(s, torch.linalg.svdvals(delta.dense())[: len(s)])
    assert delta.norm() == pytest.approx(delta.dense().norm().item(), rel=1e-5)
    other = random_delta(6, 2)
    close(delta.minus(other).dense(), delta.dense() - other.dense())


@pytest.mark.parametrize("shape", [(13, 9), (9, 13), (8, 8)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_nearest_to_a_matrix_is_that_of_its_singular_values(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    delta, lost = nearest(matrix, rank)
    close(delta.dense(), u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])
    assert lost == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=1e-6) and delta.shape == shape
    assert nearest(torch.zeros(shape), rank)[0].dense().abs().max() == 0


def test_cat_is_the_sum_and_its_ranks_add_up() -> None:
    found = combine(THREE, WEIGHTS, Combination("cat"))
    assert {name: layer.delta.rank for name, layer in found.items()} == {"x": 8, "y": 3, "z": 2}
    close(found["x"].delta.dense(), sum(w * a["x"].dense() for a, w in zip(THREE, WEIGHTS)))
    close(found["y"].delta.dense(), 0.7 * THREE[0]["y"].dense())
    close(found["z"].delta.dense(), -0.5 * THREE[2]["z"].dense())
    assert all(layer.lost == 0 and layer.from_sum < 1e-6 for layer in found.values())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_svd_is_the_nearest_matrix_of_its_rank(rank: int) -> None:
    found = combine(THREE, WEIGHTS, Combination("svd", rank))
    for name, layer in found.items():
        whole = concatenate(
            [a[name] for a in THREE if name in a], [w for a, w in zip(THREE, WEIGHTS) if name in a]
        ).dense()
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        close(layer.delta.dense(), u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank])
        lost = (s[rank:].norm() / s.norm()).item()
        assert layer.lost == pytest.approx(lost, abs=1e-6) and layer.from_sum == pytest.approx(lost, abs=1e-6)
        close(layer.delta.a.norm(), layer.delta.b.norm())


def test_an_adapter_less_itself_is_nothing() -> None:
    for method in ("cat", "svd", "linear"):
        found = combine([THREE[0], THREE[0]], [1.0, -1.0], Combination(method))
        assert found["x"].delta.norm() < 1e-5 * THREE[0]["x"].norm()
        assert found["x"].lost is None and found["x"].from_sum is None
    assert combine([THREE[0], THREE[1]], [1.0, 0.0], Combination("svd", 3))["x"].from_sum < 1e-5
    kept = combine([THREE[0], THREE[0]], [1.0, -0.999], Combination("cat"))["x"]  # a small difference is one
    assert kept.from_sum is not None and kept.from_sum < 1e-2


@pytest.mark.parametrize("method", ["ties", "ties_svd"])
def test_an_adapter_less_itself_elects_nobody(method: str) -> None:
    for weight in (-1.0, -0.99):
        found = combine([THREE[0], THREE[0]], [1.0, weight], Combination(method, density=1.0))
        assert found["x"].delta.norm() < 1e-5 * THREE[0]["x"].norm()


def test_what_overflows_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"x: the combination overflows .*Take smaller weights"):
        combine([THREE[0], THREE[0]], [1e38, 1e38], Combination("cat"))


def test_a_command_says_that_deltas_cancel_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (str(adapter(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 2)))

    def said(*folders: str) -> str:
        options = ["--method", "svd", "--weights=1,-1", "-o", str(tmp_path / f"of-{Path(folders[1]).name}")]
        assert main(["adapters", "combine", *folders, *options]) == 0
        return capsys.readouterr().out

    out = said(one, one)
    assert "the weighted deltas cancel out in 14 of 14 layers: their sum is nearly zero" in out
    assert "distance from" not in out and "left out" not in out
    layers = json.loads((tmp_path / "of-a" / "combined.json").read_text())["layers"]
    assert len(layers) == 14 and all(layer["from_sum"] is layer["lost"] is None for layer in layers.values())
    out = said(one, other)
    assert "cancel out" not in out and "distance from the weighted sum" in out


def test_ties_by_hand() -> None:
    one = torch.tensor([[4.0, -3.0, 0.1, 2.0], [-1.0, 5.0, 0.2, 0.3]])
    other = torch.tensor([[-1.0, -5.0, 3.0, 0.1], [-2.0, 0.2, 4.0, -0.1]])
    merged = merge_tensors([one, other], [1.0, 1.0], RULES["ties"], 0.5, torch.Generator())
    # Trimmed to half: one keeps 4, -3, 2, 5; other -5, 3, 4, -2.
    close(merged, torch.tensor([[4.0, -4.0, 3.0, 2.0], [-2.0, 5.0, 4.0, 0.0]]))
    less = merge_tensors([one, other], [1.0, -1.0], RULES["ties"], 0.5, torch.Generator())
    close(less, torch.tensor([[4.0, 5.0, -3.0, 2.0], [2.0, 5.0, -4.0, 0.0]]))


def test_dare_keeps_the_mean_and_draws_by_seed_and_layer() -> None:
    ones = torch.ones(400, 500)
    kept = merge_tensors([ones], [1.0], Rule("deltas", "random"), 0.2, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 5.0} and abs(kept.mean().item() - 1) < 0.02
    pair = [{"x": THREE[0]["x"], "w": THREE[0]["x"]}, {"x": THREE[1]["x"], "w": THREE[1]["x"]}]

    def draw(seed: int) -> dict[str, torch.Tensor]:
        found = combine(pair, [1.0, 1.0], Combination("dare_linear_svd", 9, density=0.5, seed=seed))
        return {name: layer.delta.dense() for name, layer in found.items()}

    assert torch.equal(draw(1)["x"], draw(1)["x"]) and not torch.equal(draw(1)["x"], draw(2)["x"])
    assert not torch.equal(draw(1)["x"], draw(1)["w"])


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(
    "ours,theirs",
    [
        ("ties", merge_utils.ties),
        ("dare_linear", merge_utils.dare_linear),
        ("dare_ties", merge_utils.dare_ties),
        ("magnitude_prune", merge_utils.magnitude_prune),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_rules_are_pefts_with_the_same_draws(ours: str, theirs, density: float) -> None:  # type: ignore[no-untyped-def]
    tensors = [random_delta(seed, 5).dense() for seed in range(3)]
    weights = [0.5, 1.2, 0.3]
    found = merge_tensors(tensors, weights, RULES[ours], density, torch.Generator().manual_seed(9))
    torch.manual_seed(9)
    close(found, theirs(tensors, torch.tensor(weights), density))


SAME_RANK = {"linear", "ties", "magnitude_prune"}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
)
def test_logits_are_those_of_pefts_add_weighted_adapter(tmp_path: Path, arch: str, method: str) -> None:
    target = ["c_attn"] if arch == "gpt2" else ["q_proj", "down_proj"]
    same = method in SAME_RANK
    adapter(tmp_path / "a", 1, arch, rank=4, alpha=6.0)
    fields = {} if same else {"rank": 3, "use_rslora": True, "target_modules": target}
    adapter(tmp_path / "b", 2, arch, **({"rank": 4, "alpha": 9.0} | fields))
    weights = [0.6, 0.9 if "ties" in method else -0.4]
    rule = RULES[method]
    density = 0.4 if rule.drop else None
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), str(tmp_path / "a"), adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
    rank = 5 if rule.cut else None
    theirs.add_weighted_adapter(["a", "b"], weights, "sum", method, svd_rank=rank, density=density)
    theirs.set_adapter("sum")

    stored = [read_adapter(tmp_path / name) for name in "ab"]
    deltas = [read_deltas(one, tmp_path) for one in stored]
    found = {name: layer.delta for name, layer in combine(deltas, weights, Combination(method, rank, density)).items()}
    like = stored[0].config | {"target_modules": list(found)}
    (tmp_path / "sum").mkdir()
    write_adapter(
        tmp_path / "sum",
        unscaled_config({name: delta.rank for name, delta in found.items()}, like),
        delta_tensors(found, read_places(stored[0]), torch.float32),
    )
    ours = peft.PeftModel.from_pretrained(tiny_model(arch), str(tmp_path / "sum"))
    assert (logits(ours) - logits(tiny_model(arch))).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-5)


REFUSED = {
    "weights": (([1.0], "cat", None, None), r"number of weights \(got 1\). Allowed: 3"),
    "infinite": (([1.0, 2.0, float("inf")], "cat", None, None), "weights .*inf.*finite"),
    "rank of cat": ((WEIGHTS, "cat", 3, None), "cat takes no rank"),
    "rank too large": ((WEIGHTS, "svd", 10, None), r"rank \(got 10\). Allowed: 1 to 8"),
    "rank too large for the matrix": ((WEIGHTS, "ties_svd", 10, 0.5), r"rank \(got 10\). Allowed: 1 to 9"),
    "no density": ((WEIGHTS, "ties_svd", 4, None), "ties_svd needs a density"),
    "density": ((WEIGHTS, "dare_ties_svd", 4, 0.0), r"density \(got 0.0\). Allowed: more than 0, at most 1"),
    "density of svd": ((WEIGHTS, "svd", 4, 0.5), "svd keeps all values"),
    "ranks": ((WEIGHTS, "linear", None, None), r"x: linear needs adapters of one rank \(got \[3, 4, 1\]\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    (weights, method, rank, density), match = REFUSED[case]
    with pytest.raises(AdapterError, match=match):
        combine(THREE, weights, Combination(method, rank, density))


def test_other_shapes_and_too_many_ranks() -> None:
    with pytest.raises(AdapterError, match="x: the adapters are for weights of different shapes"):
        combine([THREE[0], {"x": random_delta(0, 2, 4, 4)}], [1.0, 1.0], Combination("svd"))
    with pytest.raises(AdapterError, match=r"rank of the result of cat \(got 1200\). Allowed: up to 1024"):
        combine([{"x": random_delta(0, 600)}] * 2, [1.0, 1.0], Combination("cat"))


def test_adapters_that_are_not_b_a(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "dora", 1, method="dora")
    with pytest.raises(AdapterError, match=r"is a Dora adapter: .* not B A alone"):
        read_deltas(read_adapter(folder), folder)


def test_stored_adapters_that_are_not_whole(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", 1)
    stored = read_adapter(folder)
    a, b = sorted(stored.tensors)[:2]
    for name, tensor, match in (
        (a, None, "lora_A.weight is missing"),
        (a, stored.tensors[a][:3], "ranks of lora_A and lora_B .*16, as adapter_config.json says"),
        (b, stored.tensors[b] * float("nan"), "lora_B.weight holds NaN or Inf"),
    ):
        good = stored.tensors[name]
        if tensor is None:
            del stored.tensors[name]
        else:
            stored.tensors[name] = tensor
        with pytest.raises(AdapterError, match=match):
            read_deltas(stored, folder)
        stored.tensors[name] = good
    assert other_tensors(stored, folder) == {}
    stored.tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 3)
    with pytest.raises(AdapterError, match=r"embed_tokens\.lora_embedding_B is missing"):
        read_deltas(stored, folder)
    stored.tensors["base_model.model.model.embed_tokens.lora_magnitude_vector"] = torch.zeros(2)
    with pytest.raises(AdapterError, match="lora_magnitude_vector is no factor of a delta"):
        other_tensors(stored, folder)
