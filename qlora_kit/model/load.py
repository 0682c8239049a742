"""Loads base models and tokenizers; quantized ones through transformers' streaming loader and bitsandbytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from qlora_kit.errors import ModelError
from qlora_kit.model.quantize import plan_quantization, unquantized_names
from qlora_kit.model.quantized import own_quantized_layers
from qlora_kit.model.source import BaseSource
from qlora_kit.model.weights import first_line, refuse_missing_weights

if not sys.stderr.isatty():  # a bar in a log file is noise
    transformers_logging.disable_progress_bar()

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
) -> PreTrainedModel:
    """The base model, in evaluation mode, nothing trainable.

    Args:
        quant: nf4, fp4, int8 (linear layers but the head become QuantizedLinear) or none.
        double_quant: quantize the 4-bit statistics too.
        compute_dtype: of everything that is not quantized, and of activations.
        skip_modules: names of linear layers to leave unquantized, beside the head.
        quantize_later: load it whole; the adapter's method quantizes it (see `plan_quantization`).

    Raises:
        ModelError: the folder cannot be read as a causal language model, or weights are missing in it.
    """
    options: dict[str, Any] = {"dtype": compute_dtype, "device_map": {"": str(device)}}
    now = "none" if quantize_later else quant
    model = _from_pretrained(source, options, (now, double_quant), skip_modules, trust_remote_code)
    replaced = own_quantized_layers(model)
    if now != "none" and not replaced:
        raise ModelError(f"base.model {source.reference} has no linear layer to quantize", fix="Set base.quant=none")
    if quantize_later:
        plan_quantization(model, quant, double_quant, skip_modules)
    model.requires_grad_(False)
    return model.eval()


def _from_pretrained(
    source: BaseSource,
    options: dict[str, Any],
    quant: tuple[str, bool],
    skip_modules: list[str] | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model as transformers loads it, whole or not at all."""
    kind, double_quant = quant
    try:
        if kind != "none":
            keep = unquantized_names(_empty(source, trust_remote_code), skip_modules) if skip_modules else None
            options["quantization_config"] = _bitsandbytes_config(kind, double_quant, options["dtype"], keep)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            use_safetensors=True,
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
            fix="Check that the folder holds a causal language model and whole weight files",
        ) from error
    model, info = loaded
    refuse_missing_weights(info, source.reference)
    return model


def load_tokenizer(folder: Any, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, padding on the right; one without a pad token pads with eos.

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
    if tokenizer.eos_token_id is None:
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


def _bitsandbytes_config(
    quant: str, double_quant: bool, compute_dtype: torch.dtype, keep: list[str] | None
) -> BitsAndBytesConfig:
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=keep,
    )


def _empty(source: BaseSource, trust_remote_code: bool) -> PreTrainedModel:
    """The model's modules, without weights."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
