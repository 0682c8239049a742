"""Tiny random models of each architecture, and a tiny real tokenizer: made in a moment, the same each time."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
)
VOCAB_SIZE = 320
CONTEXT_LENGTH = 128
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BOS, EOS = 1, 2  # <|im_start|>, <|im_end|>, as in SmolLM2; pad is eos

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXT = """The bridge was built of stone and iron, and the river ran under it to the sea.
In the morning the ferryman counted his coins; in the evening he counted the boats.
Bread, salt, lamp oil, rope: the list was short, and the shop was shorter. system user assistant
"Where does the road end?" she asked. "At the water," he said, "or at the sky." A good film, a bad film.
"""

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 100,  # neither a multiple of 32 nor, in blocks of 64, of 256
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.1,  # large enough that positions differ
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "attention_dropout": 0.0,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_inner": 100,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT_LENGTH,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 32, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 32, "query_pre_attn_scalar": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
}


def tiny_config(arch: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of `arch`, one of ARCHITECTURES: 2 layers, width 64, VOCAB_SIZE tokens."""
    base = _GPT2 if arch == "gpt2" else _LLAMA_LIKE
    return AutoConfig.for_model(arch, **(base | _OF_ARCHITECTURE.get(arch, {}) | overrides))


def tiny_model(arch: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model in evaluation mode; the same weights for the same seed. Leaves torch's seed as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides errors
            if parameter.dim() == 1:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens: chatml template, eos <|im_end|>, pad == eos."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[EOS],
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_model(folder: Path, arch: str = "llama", tie: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """Writes a model folder: config.json, model.safetensors and the tokenizer's files. Returns `folder`."""
    tiny_model(arch, seed, tie_word_embeddings=tie, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_ids(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (rows, length), generator=generator)


@lru_cache(maxsize=1)
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()
