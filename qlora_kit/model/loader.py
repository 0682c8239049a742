"""What transformers' loader is told, and what it is kept from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BitsAndBytesConfig, modeling_utils
from transformers.utils import logging

from qlora_kit.model.head_loading import with_coded_head
from qlora_kit.model.int4_loading import Int4Config
from qlora_kit.model.quantize import Quantization


@contextmanager
def loads_only() -> Iterator[None]:
    """No report: what is missing is a fresh head, or an error of ours. And where a part of the model is put on the host
    (model/host_embedding.py) no hooks of accelerate's, which would copy all of it to the device at each use."""
    level, dispatch = logging.get_verbosity(), modeling_utils.accelerate_dispatch
    logging.set_verbosity_error()
    modeling_utils.accelerate_dispatch = lambda *_args, **_options: None
    try:
        yield
    finally:
        logging.set_verbosity(level)
        modeling_utils.accelerate_dispatch = dispatch


def quantization_config(quant: Quantization, dtype: torch.dtype, keep: list[str] | None, split: bool = False) -> Any:
    """What `from_pretrained` is told.

    Args:
        dtype: of what is not quantized, and of activations.
        keep: full names of what stays as it is; None: the head alone.
        split: whether a part of the model is put on the host, which bitsandbytes' quantizers must be told to allow.
    """
    others = None if quant.kind == "none" else _body_config(quant, dtype, keep, split)
    return others if quant.head == "none" else with_coded_head(others, quant.head, quant.double_quant)


def _body_config(
    quant: Quantization, dtype: torch.dtype, keep: list[str] | None, split: bool
) -> BitsAndBytesConfig | Int4Config:
    if quant.kind == "int4":
        return Int4Config(quant.grid, keep)
    options: dict[str, Any] = {"llm_int8_skip_modules": keep, "llm_int8_enable_fp32_cpu_offload": split}
    if quant.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
