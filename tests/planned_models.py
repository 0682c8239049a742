"""Small configurations, recipes on them, and the parts of a plan: what the tests of `plan` share."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.plan import Plan
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe

LLAMA: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 160, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA),
    ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}),
    ("mistral", LLAMA),
    ("qwen2", {key: value for key, value in LLAMA.items() if key != "head_dim"}),
    ("qwen3", LLAMA),
    ("gemma", LLAMA),
    ("gemma2", LLAMA),
    ("gemma3_text", LLAMA),
    ("phi3", {key: value for key, value in LLAMA.items() if key != "head_dim"}),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 100, "tie_word_embeddings": False}),
]


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "run": {"name": "plan"},
        "base": {"model": "tiny"},
        "data": {"train": "t.jsonl", "max_seq_len": 16},
        "train": {"max_steps": 1},
    }
    return parse_recipe(tree | {name: tree.get(name, {}) | section for name, section in sections.items()})


def tiny_model(kind: str, options: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), json.loads(config.to_json_string(use_diff=True))


def parts(found: Plan) -> dict[str, int]:
    return {part.name: part.bytes for part in found.components}
