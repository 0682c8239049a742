"""The output head becomes codes as it is read in, whatever the other layers are quantized to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.errors import ModelError
from qlora_kit.model.int4_loading import Int4Config, Int4Quantizer
from qlora_kit.model.quantized import QuantizedLinear
from qlora_kit.model.quantized_head import head_weights, put_coded_head, quantize_head

_PREFIX = "qlora_kit_head_beside_"
_READ = "heads_read"  # attribute of a model that is being loaded: parameter's name to its codes


@register_quantization_config(f"{_PREFIX}none")
class HeadAlone(QuantizationConfigMixin):
    """For a base whose other layers stay as they are."""

    def __init__(self) -> None:
        self.quant_method: Any = "none"


def with_coded_head(config: BitsAndBytesConfig | Int4Config | None, kind: str, double_quant: bool) -> Any:
    """What `from_pretrained` is told: `config` of the other layers (None: they stay), and codes of `kind` for the
    head, which `take_over_head` puts into their place afterwards."""
    if isinstance(config, BitsAndBytesConfig):
        others = "8bit" if config.load_in_8bit else "4bit"
    else:
        others = "none" if config is None else "int4"
    found: Any = config or HeadAlone()
    found.quant_method = _PREFIX + others
    found.head_kind, found.head_double_quant = kind, double_quant
    return found


def take_over_head(model: Any, dtype: torch.dtype) -> None:
    """Puts the codes that were made while loading, if any, into the place of head and tied embedding.

    Raises:
        ModelError: head and embedding are tied by the configuration, and the files hold different weights for them.
    """
    read: dict[str, QuantizedLinear] = model.__dict__.pop(_READ, {})
    if not read:
        return
    found = [read[name] for name in head_weights(model) if name in read]
    if any(not torch.equal(found[0].codes, other.codes) for other in found[1:]):
        raise ModelError(
            "the configuration ties head and embedding, and the files hold other weights for one than for the other",
            fix="Set tie_word_embeddings to false in config.json, or base.head_quant=none",
        )
    found[0].bias = model.get_output_embeddings().bias
    put_coded_head(model, found[0], dtype)


class _WithHead(HfQuantizer):
    """Before a quantizer among a class's parents: the head goes its own way."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        setattr(model, _READ, {})

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in head_weights(model) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        config: Any = self.quantization_config
        return _Quantize(config.head_kind, config.head_double_quant, super().get_quantize_ops())

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _NoOthers(HfQuantizer):
    def get_quantize_ops(self) -> Any:
        """There is no other layer to quantize."""
        return None


for _others, _quantizer in {
    "none": _NoOthers,
    "4bit": Bnb4BitHfQuantizer,
    "8bit": Bnb8BitHfQuantizer,
    "int4": Int4Quantizer,
}.items():
    register_quantizer(_PREFIX + _others)(type(f"Head{_quantizer.__name__}", (_WithHead, _quantizer), {}))


class _Quantize(ConversionOps):
    """The head's weight as it was read becomes codes, and the loader is given nothing in its place; what is not the
    head's is left to `others`."""

    def __init__(self, kind: str, double_quant: bool, others: Any) -> None:
        self.kind, self.double_quant, self.others = kind, double_quant, others

    def convert(  # type: ignore[override]  # transformers' own quantizing operations answer so too
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in input_dict.keys() & set(head_weights(model)):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            model.__dict__[_READ][name] = quantize_head(weight, self.kind, self.double_quant, None)
            nothing = weight.new_empty(len(weight), 0)  # as many rows as before: tying fits the head's bias to them
            found[name] = nn.Parameter(nothing, requires_grad=False)
        return found | (self.others.convert(input_dict, model=model, **kwargs) if input_dict else {})
