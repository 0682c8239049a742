"""Greedy answers in batches, against one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.generate import context_length, generate_greedily, generate_ids


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_answer_as_single_prompts(tiny_llama: Path, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    prompts = [torch.randint(5, 60, (length,)).tolist() for length in (9, 1, 30, 4, 4, 17, 2)]
    single = [generate_ids(model, tokenizer, prompt, 12) for prompt in prompts]
    assert generate_greedily(model, tokenizer, prompts, 12, batch_size) == single
    assert len({tuple(answer) for answer in single}) > 3
    assert generate_greedily(model, tokenizer, [], 12, batch_size) == []


def test_an_answer_may_end_with_the_context(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    room = context_length(model)
    prompts = [[7] * (room - 3), [9] * (room - 8)]
    found = generate_greedily(model, tokenizer, prompts, 6, 2)
    assert found == [generate_ids(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(found[0]) <= 3
