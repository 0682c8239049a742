"""Out of memory is not the end: smaller micro batches of the same rows, the same losses, the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_runs import adapter_sha256, resume_here, tiny_recipe, train_here, unfinish

from qlora_kit.data.masking import Encoded
from qlora_kit.errors import OutOfMemory, RecipeError, TrainingError
from qlora_kit.train.loop import train_step
from qlora_kit.train.memory_limit import LimitPassed, MemoryLimit, anonymous_bytes
from qlora_kit.train.micro_batches import MicroBatches
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import Session, start_session
from qlora_kit.train.smaller_batches import probe_longest, shortage_of

CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB"


def memory_for(rows: int, free_calls: int = 0) -> Callable[..., Any]:
    """Session.losses of a machine with memory for so many rows at once; the first calls find any number of them."""
    plain, calls = Session.losses, 0

    def losses(session: Session, batch: dict[str, torch.Tensor], group: list[Encoded]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if len(group) > rows and calls > free_calls:
            raise torch.OutOfMemoryError(f"{CUDA_SAYS}\nand more")
        return plain(session, batch, group)

    return losses


def losses_of(run: RunFolder) -> list[float]:
    return [record["loss"] for record in run.metrics() if record["kind"] == "train"]


def run_of(folder: Path, model: Path, name: str, size: int, accum: int, **changes: Any) -> RunFolder:
    train = {"micro_batch_size": size, "grad_accum_steps": accum, **changes}
    return train_here(tiny_recipe(folder, model, run={"name": name}, train=train, base={"compute_dtype": "bf16"}))


@pytest.mark.parametrize(("rows", "kept"), [(2, [[1, 2]]), (1, [[1, 2], [1, 1]])])
def test_a_run_that_does_not_fit_trains_as_one_started_smaller(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int, kept: list[list[int]]
) -> None:
    """To the byte: dropout on, bf16 adapters, gradients added up in fp32 as there."""
    expected = run_of(tmp_path, tiny_llama, "smaller", rows, 4 // rows)
    monkeypatch.setattr(Session, "losses", memory_for(rows))
    run = run_of(tmp_path, tiny_llama, "tiny", 4, 1)
    assert losses_of(run) == losses_of(expected)
    assert adapter_sha256(run.path) == adapter_sha256(expected.path)
    assert run.manifest()["smaller_micro_batches"] == kept
    note = f"step 1: out of memory with micro batches of 4 rows ({CUDA_SAYS}); on with 2"
    assert note in run.manifest()["notes"]


def test_in_the_middle_of_a_run_the_loss_goes_on_as_with_either_size(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"adapter": {"dropout": 0.0, "dtype": "fp32"}}
    runs = {}
    for name, size, accum in (("whole", 4, 2), ("small", 2, 4), ("tiny", 4, 2)):
        if name == "tiny":
            monkeypatch.setattr(Session, "losses", memory_for(2, free_calls=7))  # the second micro batch of step 4
        train = {"micro_batch_size": size, "grad_accum_steps": accum, "max_grad_norm": None}
        runs[name] = train_here(tiny_recipe(tmp_path, tiny_llama, run={"name": name}, train=train, **plain))
    found = losses_of(runs["tiny"])
    assert runs["tiny"].manifest()["smaller_micro_batches"] == [[4, 2]]
    assert found[:3] == losses_of(runs["whole"])[:3]
    assert found == pytest.approx(losses_of(runs["small"]), rel=1e-6)


@pytest.mark.parametrize("left", [2, 4, None])
def test_a_resume_takes_the_smaller_size_at_the_same_step(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    """From before the step at which memory ran out, from after it, and from the very start."""
    with monkeypatch.context() as patch:
        patch.setattr(Session, "losses", memory_for(2, free_calls=2))
        run = run_of(tmp_path, tiny_llama, "tiny", 4, 1, keep_checkpoints=9)
    assert run.manifest()["smaller_micro_batches"] == [[3, 2]]
    expected = adapter_sha256(run.path)
    unfinish(run)
    for folder in run.checkpoints.iterdir():
        if left is None or int(folder.name.removeprefix("step-")) > left:
            shutil.rmtree(folder)
    run.update_manifest(checkpoint=left, step=left or 0)
    resume_here(run)  # where there is memory enough
    assert adapter_sha256(run.path) == expected
    assert run.manifest()["smaller_micro_batches"] == [[3, 2]]


def test_one_row_that_does_not_fit_ends_the_run(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "losses", memory_for(0))
    words = r"too little memory on cpu after step 0, with micro batches of 1 row: CUDA out of memory\. Tried"
    with pytest.raises(OutOfMemory, match=words) as caught:
        train_here(tiny_recipe(tmp_path, tiny_llama, base={"quant": "none"}))
    assert isinstance(caught.value, MemoryError)
    run = RunFolder(tmp_path / "runs" / "tiny")
    for part in ("gradient_checkpointing=true", "base.quant=nf4", "max_seq_len below 120", "`qlora-kit plan`"):
        assert part in str(caught.value)
    assert run.manifest()["status"] == "failed"


def test_a_limit_that_one_row_passes_is_told_with_both_numbers(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"\d\.\d\d GiB in use, over the train\.memory_limit of 0\.02 GiB"):
        train_here(tiny_recipe(tmp_path, tiny_llama, train={"memory_limit": "20MiB"}))
    notes = RunFolder(tmp_path / "runs" / "tiny").manifest()["notes"]
    assert [note[:50] for note in notes if "out of memory" in note] == [
        "step 1: out of memory with micro batches of 2 rows"
    ]


def test_the_limit_counts_what_is_really_held() -> None:
    device, before = torch.device("cpu"), anonymous_bytes()
    limit = MemoryLimit(device, before + 2**27)
    limit.check()
    held = torch.ones(2**26)  # 256 MiB
    assert anonymous_bytes() - before > held.nbytes * 0.9
    with pytest.raises(LimitPassed, match=r"in use, over the train\.memory_limit"):
        limit.check()
    MemoryLimit(device).check()
    del held
    limit.check()


def test_the_probe_takes_the_longest_rows_and_leaves_nothing(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    plain = Session.losses

    def watched(session: Session, batch: Any, group: list[Encoded]) -> torch.Tensor:
        seen.append([len(row.input_ids) for row in group])
        return plain(session, batch, group)

    found = []
    for limit in (None, "100GiB"):
        recipe = tiny_recipe(tmp_path, tiny_llama, train={"memory_limit": limit})
        session = start_session(recipe, RunFolder(tmp_path / "unused"))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(Session, "losses", watched)
            probe_longest(session, 1)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in session.optimizer.parameters.values())
        found.append((train_step(session, 1).loss, [p.clone() for p in session.optimizer.parameters.values()]))
    lengths = sorted(session.data.train.lengths().tolist(), reverse=True)
    assert seen == [lengths[:2]]  # without a limit there is nothing to probe on a CPU
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_odd_micro_batches_are_halved_upwards() -> None:
    micro = MicroBatches(5, [(3, 3), (7, 2)])
    assert [micro.at(step) for step in (1, 2, 3, 6, 7, 100)] == [5, 5, 3, 3, 2, 2]
    rows: list[Any] = list(range(10))
    assert [len(group) for group in micro.groups(rows, 3)] == [3, 3, 3, 1]


def test_only_shortages_of_memory_are_taken_for_such() -> None:
    short = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    assert shortage_of(RuntimeError(f"{short}\nmore")) == short
    assert shortage_of(MemoryError()) == "MemoryError"
    assert shortage_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_another_failure_of_a_step_is_no_shortage(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("a wrong shape")

    monkeypatch.setattr(Session, "losses", fails)
    with pytest.raises(RuntimeError, match="a wrong shape"):
        train_here(tiny_recipe(tmp_path, tiny_llama))


@pytest.mark.parametrize("size", ["6GB", "6 GiB", "GiB", "-1GiB"])
def test_sizes_that_mean_nothing_are_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.memory_limit.*GiB"):
        tiny_recipe(tmp_path, tmp_path, train={"memory_limit": size})


def test_tiled_mlps_train_the_same(tmp_path: Path, tiny_llama: Path) -> None:
    plain: dict[str, Any] = {"adapter": {"dropout": 0.0, "dtype": "fp32"}}
    runs = [
        train_here(tiny_recipe(tmp_path, tiny_llama, run={"name": f"tiles{n}"}, train={"mlp_tiles": n}, **plain))
        for n in (1, 3)
    ]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-5)


def test_a_model_without_mlps_cannot_be_tiled(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "opt", "opt")
    with pytest.raises(TrainingError, match=r"has no MLP to tile\. Set train\.mlp_tiles=1"):
        train_here(tiny_recipe(tmp_path, model, train={"mlp_tiles": 2}))
