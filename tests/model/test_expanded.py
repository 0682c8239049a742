"""Expanded weights are kept only where they fit, and the answer is the same either way."""

import pytest
import torch
from tiny_models import save_tiny_model, tiny_ids

from qlora_kit.generate import generate_ids
from qlora_kit.model import quantized
from qlora_kit.model.load import load_base, load_tokenizer
from qlora_kit.model.quantized import QuantizedLinear, expanded
from qlora_kit.model.source import find_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_too_little_memory_keeps_nothing(folder, monkeypatch):
    model, ids = load_base(find_base(str(folder)), "nf4"), tiny_ids()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    with torch.no_grad(), expanded(model, torch.bfloat16):
        assert all(layer.kept is not None for layer in layers)
        kept = model(ids).logits
    needed = sum(layer.in_features * layer.out_features for layer in layers) * 2
    monkeypatch.setattr(quantized, "_free_bytes", lambda _: 2 * needed - 2)
    with torch.no_grad(), expanded(model, torch.bfloat16):
        assert all(layer.kept is None for layer in layers)
        assert torch.equal(model(ids).logits, kept)


def test_greedy_is_greedy_whatever_the_base_ships(folder):
    model, tokenizer = load_base(find_base(str(folder))), load_tokenizer(folder)
    prompt = tiny_ids()[0].tolist()
    plain = generate_ids(model, tokenizer, prompt, 12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    assert generate_ids(model, tokenizer, prompt, 12) == plain
    assert model.generation_config.repetition_penalty == 5.0
