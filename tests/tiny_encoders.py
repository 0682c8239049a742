"""Tiny random encoders and encoder-decoders, their tokenizers, and runs of tasks on them: the same each time."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import parse_recipe
from qlora_kit.train.loop import train
from qlora_kit.train.progress import QuietProgress
from qlora_kit.train.run_folder import RunFolder

ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
ENCODER_DECODERS = ("t5", "bart")
CONTEXT_LENGTH = 96
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
PAD, UNK, CLS, SEP, MASK = range(5)
TEXT = """The bridge was built of stone and iron, and the river ran under it to the sea.
Anna sold seven boats in Lisbon; the ferryman counted his coins in Porto by the evening.
Where did she sell them? Who built it? A good film, a bad film. 0 1 2 3 4 5 6 7 8 9 abcdefghijklmnopqrstuvwxyz"""

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.2,  # large enough that positions differ
}
_SHAPES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "max_position_embeddings": CONTEXT_LENGTH + 1, "type_vocab_size": 1},  # after pad's: 0
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.2,
    },
    "modernbert": {**_ENCODER, "local_attention": 16, "reference_compile": False},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": PAD,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 0.3,
        "tie_word_embeddings": False,
    },
    "bart": {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "init_std": 0.2,
        "decoder_start_token_id": SEP,
        "forced_eos_token_id": SEP,
    },
}


@lru_cache(maxsize=1)
def _wordpiece() -> str:
    return word_pieces(TEXT, list(SPECIAL.values()), 120).to_str()


def word_pieces(text: str, special: list[str], size: int | None = None) -> Tokenizer:
    """Lower-case word pieces of letters, words and pairs of letters: the same each time, as a trained one is not."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    letters = sorted({letter for word in words for letter in word})
    pairs = sorted({word[k : k + 2] for word in words for k in range(1, len(word) - 1)})
    whole = [word for word in words if len(word) > 1]
    pieces = [*special, *letters, *(f"##{ending}" for ending in letters), *(f"##{ending}" for ending in pairs), *whole]
    assert len(pieces) >= (size or 0)
    tokenizer = Tokenizer(models.WordPiece({piece: k for k, piece in enumerate(pieces[:size])}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return tokenizer


def tiny_wordpiece(kind: str = "bert") -> PreTrainedTokenizerFast:
    """120 lower-case word pieces, [CLS] text [SEP] pair [SEP]; only BERT is told the two apart."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {**SPECIAL, **({"bos_token": "[CLS]", "eos_token": "[SEP]"} if kind in ENCODER_DECODERS else {})}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_wordpiece()),
        model_max_length=CONTEXT_LENGTH,
        model_input_names=names if kind == "bert" else [name for name in names if name != "token_type_ids"],
        **special,
    )


def tiny_byte_level() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: bytes, a word known by the space before it, <s> text </s></s> pair </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, special)),
    )


def tiny_encoder(kind: str, auto_class: str = "AutoModel", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random fp32 model in evaluation mode, without dropout."""
    quiet = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} if kind in ("bert", "roberta") else {}
    ids = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP}
    shape = {**_SHAPES[kind], **quiet, "vocab_size": 120, **ids, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(AutoConfig.for_model(kind, **shape))
        return model.eval()


def save_tiny_encoder(folder: Path, kind: str = "bert", seed: int = 0, **config: Any) -> Path:
    """Writes a model folder: a bare encoder as a hub has it, or an encoder-decoder with its head. Returns `folder`."""
    auto_class = "AutoModelForSeq2SeqLM" if kind in ENCODER_DECODERS else "AutoModel"
    tiny_encoder(kind, auto_class, seed, **config).save_pretrained(folder)
    tiny_wordpiece(kind).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_rows(task: str, count: int) -> list[dict[str, Any]]:
    """Rows from which a task can be learned, of different lengths."""
    names, verbs, places = ("anna", "she", "the ferryman"), ("sold", "built", "counted"), ("lisbon", "porto", "the sea")
    return [_task_row(task, k, names[k % 3], verbs[k // 3 % 3], places[k % 2]) for k in range(count)]


def _task_row(task: str, k: int, who: str, did: str, place: str) -> dict[str, Any]:
    text = f"{who} {did} {' '.join(['seven'] * (1 + k % 4))} boats in {place}"
    match task:
        case "classification":
            return {"text": text, "pair": f"in {place}", "label": did}
        case "regression":
            return {"text": text, "label": float(place == "lisbon")}
        case "tagging":
            words = text.split()
            starts = {len(who.split()) - 1: "B-PER", len(words) - 1: "B-LOC"}
            return {"words": words, "tags": [starts.get(at, "O") for at in range(len(words))]}
        case "question_answering":
            answers = [{"text": place, "answer_start": text.index(place)}]
            return {"question": "where ?", "context": text, "answers": answers}
        case _:
            return {"source": text, "target": f"{place} {did}"}


def task_recipe(folder: Path, model: Path, task: dict[str, Any], **changes: Any) -> Recipe:
    """A run of 4 steps below `folder`, on nf4, its rows beside it. `changes` go into the sections; `adapter` is one."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = task_rows(task["type"], 24)
    tree: dict[str, Any] = {
        "run": {"name": "task", "out_dir": str(folder / "runs"), "seed": 3},
        "task": task,
        "base": {"model": str(model), "quant": "nf4", "compute_dtype": "fp32"},
        "adapter": changes.pop("adapter", {"rank": 4, "alpha": 8}),
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", rows[:18])),
            "eval": str(write_jsonl(folder / "eval.jsonl", rows[18:])),
            "max_seq_len": 64,
        },
        "train": {
            "optimizer": "adamw",
            "lr": 0.01,
            "max_steps": 4,
            "micro_batch_size": 4,
            "save_every": 2,
            "threads": 1,
            "gradient_checkpointing": False,
        },
        "eval": {"samples": 0},
    }
    for section, fields in changes.items():
        tree[section] |= fields
    return parse_recipe(tree)


def trained(recipe: Recipe) -> RunFolder:
    """The finished run of a recipe."""
    run = RunFolder.create(recipe)
    train(recipe, run, QuietProgress())
    return run


def train_losses(run: RunFolder) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in run.metrics() if record["kind"] == "train"]
