"""Loads base models and tokenizers; quantized ones through transformers' streaming loader and bitsandbytes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from qlora_kit.errors import ModelError
from qlora_kit.model.cache import cached, keep, made_as
from qlora_kit.model.head_loading import take_over_head
from qlora_kit.model.host_embedding import device_map, embedding_for_host, put_on_host
from qlora_kit.model.int4_blocks import INT4_GRID, Int4Grid
from qlora_kit.model.loader import loads_only, quantization_config
from qlora_kit.model.quantize import Quantization, plan_quantization, unquantized_names
from qlora_kit.model.quantized import own_quantized_layers
from qlora_kit.model.quantized_head import quantized_body
from qlora_kit.model.source import BaseSource
from qlora_kit.model.stored import check_stored, is_stored
from qlora_kit.model.weights import first_line, refuse_missing_weights

if not sys.stderr.isatty():  # a bar in a log file is noise
    transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Architecture:
    """Which of its models transformers makes of a base's weights."""

    auto_class: str = "AutoModelForCausalLM"
    config: dict[str, Any] = field(default_factory=dict)
    """What its configuration says of the task: number and names of labels."""
    fresh_head: bool = False
    """Its head need not be among the base's weights: it is made new, and never quantized."""


CAUSAL_LM = Architecture()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_base(
    source: BaseSource,
    quant: str = "none",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    skip_modules: list[str] | None = None,
    trust_remote_code: bool = False,
    quantize_later: bool = False,
    architecture: Architecture = CAUSAL_LM,
    grid: Int4Grid = INT4_GRID,
    cache: bool = False,
    head_quant: str = "none",
    host_embeddings: bool = False,
) -> PreTrainedModel:
    """The base model, in evaluation mode, nothing trainable.

    Weights are read and quantized one tensor at a time; what is not changed stays mapped to its file.

    Args:
        quant: nf4, fp4, int8, int4 (linear layers but the head become QuantizedLinear) or none.
        double_quant: quantize the 4-bit statistics too.
        compute_dtype: of everything that is not quantized, and of activations.
        skip_modules: names of linear layers to leave unquantized, beside the head.
        quantize_later: load it whole; the adapter's method quantizes it (see `plan_quantization`).
        architecture: which model is made; the weights of a fresh head are torch's random numbers.
        grid: of int4.
        cache: take the quantized base from the cache, or put it there.
        head_quant: int8 or nf4 holds the output head as codes, and a tied embedding reads them; or none.
        host_embeddings: keep a frozen embedding on the host; where `device` is the host, that changes nothing.

    Raises:
        ModelError: the folder cannot be read as such a model, weights are missing in it, or it is quantized otherwise.
    """
    on_host = None
    if host_embeddings:
        empty = _empty(source, trust_remote_code, architecture)
        on_host = embedding_for_host(empty, source.reference, skip_modules or [])
    places = device_map(torch.device(device), on_host)
    options: dict[str, Any] = {"dtype": compute_dtype, "device_map": places, **architecture.config}
    if architecture.fresh_head:
        skip_modules = [*(skip_modules or []), *head_modules(_empty(source, trust_remote_code, architecture))]
    now = "none" if quantize_later else quant
    kind = Quantization(now, double_quant, grid=grid, head=head_quant)
    folder, wanted = source.folder, None
    if is_stored(folder):
        check_stored(source, kind if not quantize_later else None, skip_modules)
    elif cache and now != "none":
        wanted = made_as(source, kind.options(), compute_dtype, device, skip_modules, asdict(architecture))
        folder = cached(wanted) or folder
    model, fresh = _from_pretrained(source, folder, options, kind, skip_modules, trust_remote_code, architecture)
    own_quantized_layers(model)
    if now != "none" and not quantized_body(model):
        raise ModelError(f"base.model {source.reference} has no linear layer to quantize", fix="Set base.quant=none")
    if wanted is not None and folder == source.folder:
        keep(model, source, wanted, fresh)
    if on_host is not None and len(places) > 1:
        put_on_host(model, on_host)
    if quantize_later:
        plan_quantization(model, quant, double_quant, skip_modules, grid)
    model.requires_grad_(False)
    return model.eval()


def _from_pretrained(
    source: BaseSource,
    folder: Path,
    options: dict[str, Any],
    quant: Quantization,
    skip_modules: list[str] | None,
    trust_remote_code: bool,
    architecture: Architecture,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model as transformers loads it, whole or not at all, and the tensors of it that were made new."""
    try:
        if not (quant.kind == quant.head == "none" or is_stored(folder)):
            empty = _empty(source, trust_remote_code, architecture) if skip_modules else None
            keep = unquantized_names(empty, skip_modules) if empty is not None and skip_modules else None
            split = len(options["device_map"]) > 1
            options["quantization_config"] = quantization_config(quant, options["dtype"], keep, split)
        with loads_only():
            loaded: Any = getattr(transformers, architecture.auto_class).from_pretrained(
                folder,
                use_safetensors=True,
                ignore_mismatched_sizes=architecture.fresh_head,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"base.model {source.reference} does not fit into memory: {first_line(error)}",
            fix="See what would: qlora-kit plan",
        ) from error
    except Exception as error:  # transformers checks few fields of a configuration: anything may come of a wrong one
        raise ModelError(
            f"base.model {source.reference} cannot be loaded: {first_line(error)}",
            fix=f"Check that the folder holds a model that {architecture.auto_class} takes, and whole weight files",
        ) from error
    model, info = loaded
    take_over_head(model, options["dtype"])
    refuse_missing_weights(info, source.reference, head_modules(model) if architecture.fresh_head else [])
    wrong = {key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())}
    return model, frozenset({*info["missing_keys"], *wrong})


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules between the base model and the task's output: the head, and a pooler below it."""
    bare = {model.base_model_prefix}
    if model.base_model is model:  # some, as T5 for questions, hold the base model's parts themselves
        with torch.device("meta"):
            bare = {name for name, _ in transformers.AutoModel.from_config(model.config).named_children()}
    heads = [
        name for name, child in model.named_children() if name not in bare and any(True for _ in child.parameters())
    ]
    pooler = getattr(model.base_model, "pooler", None)
    trained = isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters())  # of images: a mere average
    return [f"{model.base_model_prefix}.pooler", *heads] if trained else heads


def load_tokenizer(folder: Any, trust_remote_code: bool = False, generates: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, padding on the right; one without a pad token pads with eos.

    Args:
        generates: whether its model does, so that it needs an end-of-sequence token.

    Padding is never told from the pad id (it may be eos): the attention mask and the labels say it.

    Raises:
        ModelError: there is no fast tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers package raises plain Exception on a damaged file
        raise ModelError(
            f"{folder}: no tokenizer: {first_line(error)}", fix="Put the tokenizer's files beside the model"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: only a slow tokenizer", fix="Save it with a tokenizer.json")
    if generates and tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no eos_token", fix="Set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def to_reference(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its own reference, in place: every float in fp32, codes expanded in fp32, never rounded."""
    model.float()
    model.config.dtype = torch.float32
    return model.eval()


def _empty(source: BaseSource, trust_remote_code: bool, architecture: Architecture) -> PreTrainedModel:
    """The model's modules, without weights.

    Raises:
        ModelError: transformers has no such model for the base's configuration.
    """
    auto_class = getattr(transformers, architecture.auto_class)
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, **architecture.config
            )
            model: PreTrainedModel = auto_class.from_config(config, trust_remote_code=trust_remote_code)
            return model
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"base.model {source.reference} cannot be loaded: {first_line(error)}",
            fix=f"Take a base that {architecture.auto_class} knows, or another task.type",
        ) from error
