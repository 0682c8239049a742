"""Runs whose embedding stays on the host: noted where there is no other memory, and the same bits by its way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model, tiny_ids, tiny_tokenizer
from tiny_runs import adapter_sha256, tiny_recipe, tiny_tree, train_here

from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.model.host_embedding import embedding_for_host, put_on_host
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train import adapted_model
from qlora_kit.train.adapted_model import _fit_tokenizer
from qlora_kit.train.restore import load_tuned


def load_hosted(*args: Any, host_embeddings: bool, **options: Any) -> Any:
    """As on a GPU: the embedding takes the way over the host."""
    model = load_base(*args, **options)
    if host_embeddings:
        put_on_host(model, embedding_for_host(model, "tiny", []))
    return model


def test_a_run_has_the_same_bytes_and_is_read_again(
    tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, train = [], {"gradient_checkpointing": "offload"}
    for name, place in (("device", "device"), ("noted", "host"), ("hosted", "host")):
        if name == "hosted":
            monkeypatch.setattr(adapted_model, "load_base", load_hosted)
        recipe = tiny_recipe(tmp_path, tiny_qwen, run={"name": name}, base={"embeddings": place}, train=train)
        runs.append(train_here(recipe))
    assert len({adapter_sha256(run.path) for run in runs}) == 1
    notes = [[note for note in run.manifest()["notes"] if "all memory is the host's" in note] for run in runs]
    assert [len(found) for found in notes] == [1, 2, 2]
    assert notes[1][0].startswith("base.embeddings=host needs CUDA")
    logits = [load_tuned(run)(tiny_ids()).logits for run in runs]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_an_embedding_on_the_host_cannot_grow_with_the_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tie=False, vocab_size=300)  # its tokenizer has 320
    model = load_hosted(find_base(str(folder)), host_embeddings=True)
    with pytest.raises(ModelError, match=r"nor an embedding on the host can grow.*got 320.*base\.embeddings=device"):
        _fit_tokenizer(model, tiny_tokenizer())


def test_a_recipe_that_trains_it_is_refused(tmp_path: Path, tiny_qwen: Path) -> None:
    for adapter, why in (({"new_tokens": ["<a>"]}, "adapter.new_tokens"), ({"method": "full"}, "adapter.method full")):
        wanted = re.escape(f"base.embeddings: host cannot be had with {why}")
        tree = tiny_tree(tmp_path, tiny_qwen, base={"embeddings": "host", "quant": "none"}) | {"adapter": adapter}
        with pytest.raises(RecipeError, match=rf"{wanted}, which trains? the embedding"):
            parse_recipe(tree)
