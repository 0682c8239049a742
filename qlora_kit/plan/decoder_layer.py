"""A decoder layer's forward and backward pass in bytes, in the order in which torch makes and frees them.

Measured, not guessed: tests compare what is kept with what autograd keeps (saved_tensors_hooks) and the peaks with
torch's own record of every allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.plan.layer_shape import LayerShape, Projection
from qlora_kit.plan.tape import Tape

KEPT, PASSING, EXPANDED = "activations kept", "activations in passing", "weight expanded for use"
GRADIENTS = "gradients"


@dataclass(frozen=True)
class Batch:
    """A micro batch.

    Attributes:
        rows, length: it holds rows * length tokens.
        width: bytes of a number in the compute dtype.
        dropout: whether inputs of adapters are dropped, which keeps a copy and a mask of each.
        quantized: none, or how the projections are stored.
        gradient_width: bytes of an adapter's gradient.
        head_quant: none, or how the output head is stored.
    """

    rows: int
    length: int
    width: int
    dropout: bool
    quant: str
    gradient_width: int
    head_quant: str = "none"

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def kept_bytes(layer: LayerShape, batch: Batch) -> int:
    """What one layer keeps for the backward pass."""
    return _kept_by_attention(layer, batch) + _kept_by_mlp(layer, batch)


def _kept_by_norms(layer: LayerShape, batch: Batch, norms: int) -> int:
    """Each keeps its input in fp32 and one fp32 factor a token."""
    return norms * batch.tokens * 4 * (layer.hidden + 1)


def _kept_by_attention(layer: LayerShape, batch: Batch) -> int:
    tokens, width = batch.tokens, batch.width
    kept = _kept_by_norms(layer, batch, (layer.norms + 1) // 2)
    kept += _adapter_inputs(layer.attention_in, layer.hidden, batch)
    stream = 2 * layer.query + 2 * layer.key_value  # q, k, v and the result
    if layer.fused:
        stream += layer.query + layer.key_value  # v is a part of the whole projection
    kept += tokens * (width * stream + 4 * layer.heads)
    if layer.qk_norm:
        kept += tokens * 4 * (layer.query + layer.key_value + layer.heads + layer.key_value_heads)
    return kept + _inner(layer.attention_out, batch) + _residual_mask(layer, batch)


def _residual_mask(layer: LayerShape, batch: Batch) -> int:
    """Phi 3 drops from what it adds to the stream: torch keeps a mask of a byte a number, be the share zero."""
    return batch.tokens * layer.hidden if layer.fused else 0


def _kept_by_mlp(layer: LayerShape, batch: Batch) -> int:
    tokens, width = batch.tokens, batch.width
    kept = _kept_by_norms(layer, batch, layer.norms // 2)
    kept += _adapter_inputs(layer.mlp_in, layer.hidden, batch)
    kept += tokens * width * layer.intermediate * (3 if layer.gated else 1)  # gate, its activation, up
    return kept + _adapter_inputs((layer.mlp_out,), layer.intermediate, batch) + _residual_mask(layer, batch)


def _adapter_inputs(projections: tuple[Projection, ...], width: int, batch: Batch) -> int:
    """One input that all share, and what is inside of each adapter."""
    shared = batch.tokens * batch.width * width if any(p.rank for p in projections) and not batch.dropout else 0
    return shared + sum(_inner(p, batch) for p in projections)


def _inner(projection: Projection, batch: Batch) -> int:
    dropped = 2 * projection.inputs if batch.dropout and projection.rank else 0
    return batch.tokens * batch.width * (projection.rank + dropped)


def expanded_bytes(weights: int, batch: Batch) -> int:
    """A weight in the compute dtype, with what bitsandbytes makes on the way: absmax, or two copies in fp32."""
    if batch.quant == "none":
        return 0
    if batch.quant == "int8":
        return max(8, 4 + batch.width) * weights
    return weights * batch.width + weights // 16


def forward(tape: Tape, layer: LayerShape, batch: Batch, keeps: bool) -> None:
    """The forward pass; `keeps`: whether for a backward pass."""
    tokens, width = batch.tokens, batch.width
    stream = tokens * width * layer.hidden
    attention, mlp = _kept_by_attention(layer, batch), _kept_by_mlp(layer, batch)
    tape.take(KEPT, attention)
    tape.brief(PASSING, 4 * tokens * width * layer.query + stream)  # rotary positions
    _expand(tape, layer.attention_out, batch, stream)
    if not keeps:
        tape.give(KEPT, attention)
    tape.take(PASSING, stream)  # the sum after attention
    tape.take(KEPT, mlp)
    for projection in (*layer.mlp_in, layer.mlp_out):
        _expand(tape, projection, batch, stream if projection is layer.mlp_out else 0)
    if not keeps:
        tape.give(KEPT, mlp)
    tape.give(PASSING, stream)


def forward_only(tape: Tape, layer: LayerShape, batch: Batch) -> None:
    """A forward pass of which nothing is kept."""
    numbers = batch.tokens * batch.width
    stream, inner, heads = numbers * layer.hidden, numbers * layer.intermediate, layer.query + 2 * layer.key_value
    tape.take(PASSING, stream)  # the layer's input
    tape.brief(PASSING, 12 * batch.tokens * layer.hidden)  # a norm, in fp32
    tape.take(PASSING, stream + numbers * heads)
    for projection in layer.attention_in:
        tape.brief(EXPANDED, expanded_bytes(projection.weights, batch))
    tape.brief(PASSING, numbers * (2 * layer.query + 2 * layer.key_value))  # rotary positions, the result
    tape.give(PASSING, numbers * heads)
    _expand(tape, layer.attention_out, batch, numbers * layer.query + stream)
    tape.take(PASSING, stream + inner * (2 if layer.gated else 1))  # the sum; an activation and what it meets
    for projection in layer.mlp_in:
        tape.brief(EXPANDED, expanded_bytes(projection.weights, batch))
    tape.brief(PASSING, inner * (2 if layer.fused else 1))
    tape.give(PASSING, inner * (2 if layer.gated else 1))
    _expand(tape, layer.mlp_out, batch, inner + stream)
    tape.give(PASSING, 3 * stream)


def _expand(tape: Tape, projection: Projection, batch: Batch, beside: int) -> None:
    size = expanded_bytes(projection.weights, batch)
    tape.take(PASSING, beside)
    tape.brief(EXPANDED, size)
    tape.give(PASSING, beside)


def backward(tape: Tape, layer: LayerShape, batch: Batch) -> None:
    """The backward pass of a layer whose `kept_bytes` are on the tape; the gradient of its output is in passing."""
    tokens, width = batch.tokens, batch.width
    _backward_mlp(tape, layer, batch)
    _backward_norms(tape, layer, batch, layer.norms // 2)
    attention = _kept_by_attention(layer, batch)
    # Gradients of the result, and of q, k and v before and behind the rotation.
    gradients = tokens * width * (2 * layer.query + 2 * layer.key_value)
    tape.take(PASSING, tokens * width * layer.query)
    tape.brief(EXPANDED, expanded_bytes(layer.attention_out.weights, batch))
    tape.take(PASSING, gradients)
    tape.brief(PASSING, tokens * width * 2 * layer.query)
    inputs = _kept_by_norms(layer, batch, (layer.norms + 1) // 2) + _adapter_inputs(
        layer.attention_in, layer.hidden, batch
    )
    tape.give(KEPT, attention - inputs)
    tape.give(PASSING, tokens * width * layer.query)
    for projection in layer.attention_in:
        tape.brief(EXPANDED, expanded_bytes(projection.weights, batch) + tokens * width * layer.hidden)
    tape.give(PASSING, gradients)
    tape.give(KEPT, inputs - _kept_by_norms(layer, batch, (layer.norms + 1) // 2))
    _backward_norms(tape, layer, batch, (layer.norms + 1) // 2)
    tape.take(GRADIENTS, sum(p.trained for p in (*layer.attention_in, layer.attention_out)) * batch.gradient_width)


def _backward_mlp(tape: Tape, layer: LayerShape, batch: Batch) -> None:
    inner, stream = (batch.tokens * batch.width * size for size in (layer.intermediate, layer.hidden))
    tape.take(PASSING, inner)  # the gradient of what goes into the down projection
    tape.brief(EXPANDED, expanded_bytes(layer.mlp_out.weights, batch))
    tape.give(KEPT, (inner if layer.mlp_out.rank else 0) + _inner(layer.mlp_out, batch))
    if layer.gated:
        tape.take(PASSING, 2 * inner)
        tape.give(PASSING, inner)
        tape.give(KEPT, 2 * inner)
        up = layer.mlp_in[-1]
        tape.take(PASSING, stream)
        tape.brief(EXPANDED, expanded_bytes(up.weights, batch))
        tape.give(PASSING, inner)
    else:
        tape.take(PASSING, stream)
    tape.brief(PASSING, inner)  # through the activation
    tape.give(KEPT, inner)
    tape.take(PASSING, stream)
    tape.brief(EXPANDED, expanded_bytes(layer.mlp_in[0].weights, batch))
    tape.give(PASSING, 2 * stream + inner)
    tape.give(KEPT, _adapter_inputs(layer.mlp_in, layer.hidden, batch))
    tape.take(GRADIENTS, sum(p.trained for p in (*layer.mlp_in, layer.mlp_out)) * batch.gradient_width)


def _backward_norms(tape: Tape, layer: LayerShape, batch: Batch, norms: int) -> None:
    """Five fp32 tensors at once: the gradient so far, that of the mean, and three of the square's."""
    stream = batch.tokens * batch.width * layer.hidden
    tape.take(PASSING, stream)
    for _ in range(norms):
        tape.brief(PASSING, 20 * batch.tokens * layer.hidden)
        tape.give(KEPT, _kept_by_norms(layer, batch, 1))
    tape.give(PASSING, stream)
