"""Wrong use of `qlora-kit adapters`: each refused by name, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from adapter_folders import adapter
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [
        str(adapter(tmp_path / "a", 1, rank=4)),
        str(adapter(tmp_path / "b", 2, rank=3, target_modules=["q_proj", "up_proj"])),
    ]


CAT, SVD = ["--method", "cat"], ["--method", "svd"]
TIES = ["--method", "ties_svd"]
REFUSED: dict[str, tuple[list[str], str]] = {  # options of combine, A and B being adapters, and the message
    "missing folder": ([*CAT, "--weights", "1,1", "A", "nowhere"], "no folder nowhere"),
    "no adapter": ([*CAT, "--weights", "1,1", "A", "."], "holds no adapter: neither adapter_config.json nor adapter/"),
    "number of weights": ([*CAT, "--weights", "1", "A", "B"], r"number of weights \(got 1\). Allowed: 2"),
    "weights that are none": ([*CAT, "--weights", "1,x", "A", "B"], "--weights: invalid numbers value: '1,x'"),
    "no density": ([*TIES, "--weights", "1,1", "A", "B"], "ties_svd needs a density"),
    "density": (
        [*TIES, "--weights", "1,1", "--density", "1.5", "A", "B"],
        r"density \(got 1.5\). Allowed: more than 0",
    ),
    "density nan": ([*TIES, "--weights", "1,1", "--density", "nan", "A", "B"], r"density \(got nan\)"),
    "rank": ([*SVD, "--weights", "1,1", "--rank", "99", "A", "B"], r"rank \(got 99\). Allowed: 1 to 7"),
    "rank 0": ([*SVD, "--weights", "1,1", "--rank", "0", "A", "B"], r"rank \(got 0\)"),
    "ranks that differ": (["--method", "linear", "--weights", "1,1", "A", "B"], "linear needs adapters of one rank"),
    "DoRA": ([*SVD, "--weights", "1,1", "A", "DORA"], "dora is a Dora adapter: .*not B A alone"),
    "another model": ([*SVD, "--weights", "1,1", "A", "WIDE"], "weights of different shapes"),
    "there already": ([*SVD, "--weights", "1,1", "A", "B", "-o", "A"], "a is there already"),
    "no such method": (["--method", "mean", "--weights", "1,1", "A", "B"], "invalid choice: 'mean'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combine_refuses(tmp_path: Path, pair: list[str], case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    places = {"A": pair[0], "B": pair[1]}
    if "DORA" in options:
        places["DORA"] = str(adapter(tmp_path / "dora", 3, method="dora"))
    if "WIDE" in options:
        shutil.copytree(pair[0], tmp_path / "wide")
        stored = tmp_path / "wide" / "adapter_model.safetensors"
        tensors = load_file(stored)
        save_file({key: torch.cat([t, t], 1) if "lora_A" in key else t for key, t in tensors.items()}, stored)
        places["WIDE"] = str(tmp_path / "wide")
    arguments = ["-o", str(tmp_path / "new"), *(places.get(option, option) for option in options)]
    refused(["adapters", "combine", *arguments], message, tmp_path, capsys)


def test_other_actions_refuse(tmp_path: Path, pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dora = str(adapter(tmp_path / "dora", 3, method="dora"))
    few = str(adapter(tmp_path / "few", 3, target_modules=["o_proj"]))
    new = str(tmp_path / "new")
    for arguments, message in (
        (["convert", dora, "-o", new], "is a Dora adapter: .*not B A alone"),
        (["convert", pair[0], "-o", new, "--rank", "5"], r"rank \(got 5\). Allowed: 1 to 4, the adapter's own"),
        (["convert", pair[0], "-o", pair[1]], "is there already"),
        (["inspect", dora], "is a Dora adapter"),
        (["inspect", pair[1], few], "have no layer in common"),
        (["inspect", "nowhere"], "no folder nowhere"),
        (["list", "nowhere"], "no folder nowhere"),
        (["list", str(save_tiny_model(tmp_path / "model"))], "holds no adapter, and no folder in it does"),
        (["lists"], "invalid choice: 'lists'"),
    ):
        refused(["adapters", *arguments], message, tmp_path, capsys)
