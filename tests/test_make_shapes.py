"""Checkpoints of a given shape: what scripts/make_shapes.py writes is what transformers reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base

SCRIPTS = Path(__file__).parents[1] / "scripts"
PUBLISHED = {  # parameters as the models' own pages count them
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("make_shapes", None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    from make_shapes import parameter_shapes, shapes

    assert set(shapes()) == set(PUBLISHED)
    sizes = parameter_shapes(shapes()[name])
    assert sum(torch.Size(shape).numel() for shape in sizes.values()) == PUBLISHED[name]


@pytest.mark.parametrize("tie", [True, False])
def test_the_folder_is_a_sharded_checkpoint(tmp_path: Path, tie: bool) -> None:
    from make_shapes import write_shape

    config = tiny_config("qwen2", tie_word_embeddings=tie).to_dict() | {"dtype": "bfloat16"}
    total = write_shape(config, tmp_path, shard=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model = load_base(find_base(str(tmp_path)))
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert total == index["metadata"]["total_size"] == 2 * sum(p.numel() for p in plain.parameters())
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16 and 0.015 < weight.float().std() < 0.025
    assert (model.get_output_embeddings().weight is weight) == tie


def test_holes_read_as_zeros(tmp_path: Path) -> None:
    from make_shapes import write_shape

    config = tiny_config("llama", num_hidden_layers=3).to_dict() | {"dtype": "bfloat16"}
    sizes = [write_shape(config, tmp_path / name, zeros_from=first) for name, first in (("whole", None), ("holes", 1))]
    assert sizes[0] == sizes[1]
    for name, tensor in load_base(find_base(str(tmp_path / "holes"))).state_dict().items():
        assert bool(tensor.any()) != (".layers.1." in name or ".layers.2." in name), name


def test_a_full_disk_is_said_beforehand(tmp_path: Path) -> None:
    from make_shapes import write_shape

    config = tiny_config("llama", vocab_size=2**34).to_dict()
    with pytest.raises(SystemExit, match=r"GiB free; 4096\.0 GiB and one more"):
        write_shape(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
