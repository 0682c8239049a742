"""Makes a merged model easier to round to 8 bit without changing its function (SmoothQuant, Xiao et al. 2022, eq. 4).

onnxruntime's 8-bit kernel rounds activations too, in blocks of 32 channels that share a scale: one large channel
costs its neighbours their precision. Dividing channel j of a layer's input by s_j and multiplying column j of its
weight by s_j leaves the product as it was. The division is folded into what makes the input: the norm before
q/k/v and gate/up, the rows of up_proj before down_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

STRENGTH = 0.6  # alpha of eq. 4: how much of the range moves into the weight


@dataclass(frozen=True)
class SmoothingPair:
    """`source` makes, channel by channel, the input of linear `layers`: a norm, or a linear layer by its rows."""

    source: Any
    layers: list[Any]


@torch.no_grad()
def smooth(model: PreTrainedModel, rows: Sequence[Sequence[int]], strength: float = STRENGTH) -> int:
    """Moves range from activations into weights, in place. Returns how many linear layers were smoothed.

    Args:
        model: merged, fp32. Layers that are not built as Llama's are (see `smoothing_pairs`) are left alone.
        rows: token ids of training rows, on which the inputs' ranges are measured; none leave the model as it is.
    """
    pairs = list(smoothing_pairs(model)) if rows else []
    if not pairs:
        return 0
    ranges = _input_ranges(model, [pair.layers[0] for pair in pairs], rows)
    for pair, reach in zip(pairs, ranges):
        weight_reach = torch.stack([layer.weight.abs().amax(0) for layer in pair.layers]).amax(0)
        scale = reach.clamp_min(1e-5) ** strength / weight_reach.clamp_min(1e-5) ** (1 - strength)  # [in]
        scale /= scale.log().mean().exp()  # around 1: norms stay of their size
        weight = pair.source.weight  # a norm's [channels], or a linear layer's [channels, in]
        weight.data /= scale.view(-1, *[1] * (weight.ndim - 1))
        if getattr(pair.source, "bias", None) is not None:
            pair.source.bias.data /= scale
        for layer in pair.layers:
            layer.weight.data *= scale
    return sum(len(pair.layers) for pair in pairs)


def smoothing_pairs(model: PreTrainedModel) -> Iterator[SmoothingPair]:
    """The places of a Llama-like decoder where a scale can be folded in; none for other shapes."""
    for module in model.modules():
        block: Any = module
        # Without both norms attention and mlp may share one (Cohere), or the norms come after (OLMo 2).
        if not all(
            hasattr(block, name) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        ):
            continue
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


def _input_ranges(model: PreTrainedModel, layers: list[Any], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Largest |input| of each channel of each layer over all rows, float32 [in]."""
    ranges: dict[nn.Module, Tensor] = {layer: torch.zeros(layer.in_features, device=model.device) for layer in layers}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reach = inputs[0].abs().flatten(0, -2).amax(0)
        ranges[layer] = torch.maximum(ranges[layer], reach)

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    for row in rows:
        model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [ranges[layer] for layer in layers]
