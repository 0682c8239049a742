"""Tiny tokenizers, trained here on a few sentences, with the templates of the models they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_kit.recipe import DataSection

TEXT = [
    "The quick brown fox jumps over the lazy dog while seven wizards mix jugs of boxed liquor.",
    "Question: how many apples are left? Answer: three apples are left, because two were eaten.",
    "You are a helpful assistant. system user assistant tool instruction response input output",
    'def f(x):\n    return {"name": x, "arguments": [1, 2, 3]}\n\n# 0123456789 + - * / = <tool_call>',
    "Grüße aus Köln, naïve café, 東京, 🙂 and many more words that were never seen before.",
]
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named Smol<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (  # closes its mark before the end-of-turn token, as some do
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (  # drops the reasoning of all but the last turn, as Qwen3's does
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and not loop.last and "
    "'</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _byte_level(template: str | None, eos: str = "<|im_end|>", bos: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, bos_token=bos)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = template
    return fast


def _llama() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = LLAMA
    return fast


@pytest.fixture
def smol() -> PreTrainedTokenizerFast:
    """ChatML with a default system prompt; bos opens turns, pad is eos."""
    return _byte_level(SMOL, bos="<|im_start|>")


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """Plain ChatML."""
    return _byte_level(CHATML)


@pytest.fixture
def base() -> PreTrainedTokenizerFast:
    """A base model's: no template, eos is <|endoftext|>, nothing added to plain text."""
    return _byte_level(None, eos="<|endoftext|>")


@pytest.fixture
def llama() -> PreTrainedTokenizerFast:
    """SentencePiece-like with bos added to plain text and written by the template before each user turn."""
    return _llama()


@pytest.fixture
def marked() -> PreTrainedTokenizerFast:
    """A template with {% generation %}."""
    return _byte_level(MARKED)


@pytest.fixture
def reasoning() -> PreTrainedTokenizerFast:
    """A template that rewrites earlier assistant turns."""
    return _byte_level(REASONING)


@pytest.fixture
def section() -> Callable[..., DataSection]:
    """Makes a data section from keywords."""
    return lambda **fields: DataSection.model_validate({"train": "unused.jsonl"} | fields)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a JSONL file and gives its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
