"""What a head of codes cannot do in training."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny_model
from tiny_runs import tiny_recipe, train_here

from qlora_kit.errors import ModelError


def test_codes_cannot_grow_with_the_tokenizer(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", vocab_size=300)  # its tokenizer has 320
    with pytest.raises(ModelError, match=r"more tokens than the model has words.*got 320.*Set base.head_quant=none"):
        train_here(tiny_recipe(tmp_path, model, base={"head_quant": "int8"}))
