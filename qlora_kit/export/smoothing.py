"""Makes a merged model easier to round to 8 bit without changing its function (SmoothQuant, Xiao et al. 2022, eq. 4).

onnxruntime's 8-bit kernel rounds activations too, in blocks of 32 channels that share a scale: one large channel
costs its neighbours their precision. Dividing channel j of a layer's input by s_j and multiplying column j of its
weight by s_j leaves the product as it was. The division is folded into what makes the input: the norm before
q/k/v and gate/up, the rows of up_proj before down_proj.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.export.calibration import linear_layers
from qlora_kit.export.parameters import Factors

STRENGTH = 0.6  # alpha of eq. 4: how much of the range moves into the weight


@dataclass(frozen=True)
class SmoothingPair:
    """`source` makes, channel by channel, the input of linear `layers`: a norm, or a linear layer by its rows."""

    source: Any
    layers: list[Any]


@torch.no_grad()
def smoothing_factors(model: PreTrainedModel, ranges: Mapping[str, Tensor], strength: float = STRENGTH) -> Factors:
    """What moves range from activations into weights. Layers that are not built as Llama's are left alone.

    Args:
        model: merged, fp32.
        ranges: of `input_ranges`; none leave the model as it is.
    """
    names = {module: name for name, module in model.named_modules()}
    factors: dict[str, list[Tensor]] = defaultdict(list)
    for pair in smoothing_pairs(model) if ranges else ():
        weight_reach = torch.stack([layer.weight.abs().amax(0) for layer in pair.layers]).amax(0)
        reach = ranges[names[pair.layers[0]]].clamp_min(1e-5)
        scale = reach**strength / weight_reach.clamp_min(1e-5) ** (1 - strength)  # [in]
        scale /= scale.log().mean().exp()  # around 1: norms stay of their size
        for key, parameter in pair.source.named_parameters():  # a norm's [channels], or a linear layer's by rows
            factors[f"{names[pair.source]}.{key}"].append(1 / scale.view(-1, *[1] * (parameter.ndim - 1)))
        for layer in pair.layers:
            factors[f"{names[layer]}.weight"].append(scale)
    return dict(factors)


def smoothing_pairs(model: PreTrainedModel) -> Iterator[SmoothingPair]:
    """The places of a Llama-like decoder where a scale can be folded in; none for other shapes."""
    for block in _decoder_blocks(model):
        heads = [getattr(block.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        gate, up, down = [getattr(block.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        # Gemma 2 and 3 have a norm more, and there post_attention_layernorm feeds no layer.
        before_mlp = getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm
        if _feeds(block.input_layernorm, heads):
            yield SmoothingPair(block.input_layernorm, heads)
        if _feeds(before_mlp, [gate, up]):
            yield SmoothingPair(before_mlp, [gate, up])
        if all(isinstance(layer, nn.Linear) for layer in (gate, up, down)):
            yield SmoothingPair(up, [down])


def _decoder_blocks(model: PreTrainedModel) -> Iterator[Any]:
    for module in model.modules():
        # Without both norms attention and mlp may share one (Cohere), or the norms come after (OLMo 2).
        if all(hasattr(module, name) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")):
            yield module


def _feeds(norm: Any, layers: list[Any]) -> bool:
    """Whether the layers are linear and the norm's output is proportional to its weight (Gemma's is not: 1 + w)."""
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return False
    if not isinstance(getattr(norm, "weight", None), Tensor):  # OLMo's norm has none
        return False
    weight = norm.weight.data
    probe = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    before = norm(probe)
    norm.weight.data = weight * 2
    doubled = norm(probe)
    norm.weight.data = weight
    return getattr(norm, "bias", None) is None and torch.allclose(doubled, before * 2, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def input_ranges(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Largest |input| of each channel of each linear layer over all rows, float32 [in].

    Nothing where there are no rows, or no layers to smooth by it.

    Args:
        model: merged or with its adapter.
        rows: token ids of training rows.
    """
    ranges: dict[str, Tensor] = {}
    if not any(True for _ in _decoder_blocks(model)):
        return ranges

    def recorder(name: str) -> Any:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reach = inputs[0].abs().flatten(0, -2).amax(0).float()
            ranges[name] = torch.maximum(ranges[name], reach) if name in ranges else reach

        return record

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in linear_layers(model).items()]
    for row in rows:
        model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return ranges
