"""A tiny random Llama with a tokenizer and chat template of its own, and the making of a bundle from it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from qlora_runtime import (
    Manifest,
    ModelInfo,
    Provenance,
    ReferencePrompt,
    sha256_file,
    write_manifest,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
CONTEXT_LENGTH = 96

TEXT = """The bridge was built of stone and iron, and the river ran under it to the sea.
In the morning the ferryman counted his coins; in the evening he counted the boats.
Bread, salt, lamp oil, rope: the list was short, and the shop was shorter.
"Where does the road end?" she asked. "At the water," he said, "or at the sky."
"""

CHAT_TEMPLATE = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Tiny:
    """The trained side: what the bundle must agree with."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    folder: Path  # model and tokenizer, as transformers saves them


def make_tiny(folder: Path) -> Tiny:
    """The same weights each time, saved into `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.3,  # large enough that the greedy answers wander
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    tokenizer = _pretrained_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Tiny(model, tokenizer, folder)


def build_graph(model_dir: Path, bundle_dir: Path, cache: Path) -> None:
    """The graph from onnxruntime-genai's builder, in a bundle's layout."""
    import onnx
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    raw = cache / "raw"
    arguments = ("", str(model_dir), str(raw), "fp32", "cpu", str(cache))
    create_model(*arguments, **parse_extra_options(*arguments, []))
    (bundle_dir / "onnx").mkdir(parents=True)
    onnx.save_model(
        onnx.load(raw / "model.onnx"),
        bundle_dir / "onnx" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    config = json.loads((raw / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "onnx/model.onnx"
    (bundle_dir / "genai_config.json").write_text(json.dumps(config, indent=2))


def write_tiny_manifest(folder: Path, **changes) -> Manifest:
    template = folder / "chat_template.jinja"
    arguments = {
        "profile": "fp32",
        "model": ModelInfo("LlamaForCausalLM", VOCAB_SIZE, CONTEXT_LENGTH, (EOS,), PAD),
        "provenance": Provenance(
            base={"model": "tiny"},
            adapter=None,
            tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
            chat_template_sha256=sha256_file(template) if template.exists() else None,
        ),
        "verification": None,
        "tools": {"onnxruntime": "test"},
        "created": "2025-01-01T00:00:00+00:00",
    }
    return write_manifest(folder, **(arguments | changes))


def reference_prompt(tiny: Tiny, input_ids: list[int], answer_tokens: int = 12, k: int = 5) -> ReferencePrompt:
    """What the torch model says: top-k logits on the prompt, a greedy answer and its margins."""
    top = torch_logits(tiny, input_ids).topk(k)
    ids, greedy, margins = list(input_ids), [], []
    for _ in range(answer_tokens):
        best = torch_logits(tiny, ids)[-1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        greedy.append(int(best.indices[0]))
        ids.append(greedy[-1])
    return ReferencePrompt(list(input_ids), top.indices.tolist(), top.values.tolist(), greedy, margins)


def torch_logits(tiny: Tiny, input_ids: list[int]) -> torch.Tensor:
    """[seq, vocab] float32."""
    with torch.no_grad():
        return tiny.model(torch.tensor([input_ids])).logits[0]


def random_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(len(SPECIAL_TOKENS), VOCAB_SIZE, shape)


def byte_level_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and one character may need several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _pretrained_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )
