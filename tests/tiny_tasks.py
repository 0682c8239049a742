"""Tiny random models of tasks that do not generate, with tokenizers of their own, and the bundles made from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from qlora_runtime.task import ClassificationTask, QuestionAnsweringTask, RegressionTask, TaggingTask, TaskInfo
from tiny_encoders import word_pieces
from tiny_models import TEXT, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from qlora_kit.data.task_examples import LabelledText, QuestionOnText, TaggedWords
from qlora_kit.export.task_bundle import TaskModel, make_task_bundle
from qlora_kit.export.task_graph import input_names
from qlora_kit.export.task_proof import TaskDistances, TaskProofRow, answered, context_length, row_encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP = 0, 2, 3
LENGTH = 40  # tokens of a row; the models can read 64
LABELS = ("bad", "good", "odd")
TAGS = ("O", "B-place", "I-place", "B-thing", "I-thing")
CONTEXT = " ".join(TEXT.split())

TEXTS: list[str | tuple[str, str]] = [
    "The bridge",
    "Bread, salt, lamp oil, rope: the list was short, and the shop was shorter.",
    ("Where does the road end?", "At the water, he said, or at the sky."),
    "x",
    ("A good film", CONTEXT[:200]),
    "In the morning the ferryman counted his coins",
]
SENTENCES: list[list[str]] = [
    ["The", "bridge", "was", "built", "of", "stone"],
    ["Bread"],
    CONTEXT.split()[:14],
    CONTEXT.split(),
]
QUESTIONS: list[tuple[str, str]] = [
    ("Where does the road end?", CONTEXT),
    ("What was built?", "The bridge was built of stone and iron."),
    ("Who counted his coins?", CONTEXT[:150]),
]


@dataclass(frozen=True)
class TinyTask:
    """An architecture with a task."""

    arch: str
    info: TaskInfo
    auto_class: str

    @property
    def examples(self) -> list[Any]:
        if isinstance(self.info, TaggingTask):
            return [TaggedWords(tuple(words), None) for words in SENTENCES]
        if isinstance(self.info, QuestionAnsweringTask):
            return [QuestionOnText(question, context, ()) for question, context in QUESTIONS]
        pairs = [(text, None) if isinstance(text, str) else text for text in TEXTS]
        return [LabelledText(text, pair, None) for text, pair in pairs]


_SEQUENCE, _TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
_SPANS = "AutoModelForQuestionAnswering"
TASKS = {
    "bert classifies": TinyTask("bert", ClassificationTask(LABELS, False, LENGTH), _SEQUENCE),
    "distilbert gives several labels": TinyTask("distilbert", ClassificationTask(LABELS, True, LENGTH), _SEQUENCE),
    "llama rates": TinyTask("llama", RegressionTask(LENGTH), _SEQUENCE),
    "bert tags": TinyTask("bert", TaggingTask(TAGS, "bio", LENGTH), _TOKENS),
    "modernbert tags": TinyTask("modernbert", TaggingTask(LABELS, "plain", LENGTH), _TOKENS),
    "bert answers": TinyTask("bert", QuestionAnsweringTask(8, 6, False, LENGTH), _SPANS),
    "roberta answers or not": TinyTask("roberta", QuestionAnsweringTask(8, 6, True, LENGTH), _SPANS),
}

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "initializer_range": 0.3,  # large enough that decisions differ
}
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "modernbert": {
        "cls_token_id": CLS,
        "sep_token_id": SEP,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "initializer_cutoff_factor": 2.0,
    },
    "llama": {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
}


def task_tokenizer(arch: str) -> PreTrainedTokenizerFast:
    """Word pieces; of RoBERTa byte-level tokens, of Llama those of `tiny_tokenizer`."""
    if arch == "llama":
        return tiny_tokenizer()
    names = ["input_ids", "attention_mask"]
    if arch == "roberta":
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_byte_level()),
            cls_token="<s>",
            sep_token="</s>",
            pad_token="<pad>",
            model_input_names=names,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=word_pieces(TEXT, SPECIAL, 170),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if arch == "bert" else names,
    )


def task_model(tiny: TinyTask, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode."""
    settings = _SHAPE | _OF_ARCHITECTURE.get(tiny.arch, {}) | {"vocab_size": len(task_tokenizer(tiny.arch))}
    config = AutoConfig.for_model(tiny.arch, **settings)
    labels = getattr(tiny.info, "labels", ("value",))
    if not isinstance(tiny.info, QuestionAnsweringTask):
        config.num_labels = len(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.auto_class).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides errors
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_task_model(folder: Path, tiny: TinyTask, seed: int = 0) -> Path:
    """A model folder with its tokenizer."""
    task_model(tiny, seed).save_pretrained(folder)
    task_tokenizer(tiny.arch).save_pretrained(folder)
    return folder


def proof_of(tiny: TinyTask, model: PreTrainedModel, tokenizer: Any) -> list[TaskProofRow]:
    """The model's own logits on its task's examples."""
    names, encode = input_names(model, tokenizer), row_encoder(tiny.info, tokenizer)
    return [
        TaskProofRow(answered(model, names, tiny.info, row, places), "held_out")
        for example in tiny.examples
        for row, places in encode(example)
    ]


def make_tiny_bundle(tiny: TinyTask, merged: Path, target: Path, profile: str = "fp32") -> TaskDistances:
    """The bundle of a folder of `save_task_model`."""
    tokenizer = task_tokenizer(tiny.arch)
    model = getattr(transformers, tiny.auto_class).from_pretrained(merged).eval()
    made = TaskModel(tiny.info, tiny.auto_class, tokenizer, context_length(model), proof_of(tiny, model, tokenizer))
    return make_task_bundle(merged, target, profile, made, {"model": "tiny"}, None, {"a": "1"})


@lru_cache(maxsize=1)
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer.to_str()
