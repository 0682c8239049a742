"""One decoder layer as a training step sees it: its projections, what adapters keep of them, and its norms."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.plan.shapes import Linear, ModelShapes

_ATTENTION_IN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn")
_ATTENTION_OUT = ("o_proj", "attn.c_proj")
_MLP_IN = ("gate_proj", "up_proj", "gate_up_proj", "c_fc")


@dataclass(frozen=True)
class Projection:
    """A linear layer of a decoder layer. `rank`: numbers a token that its adapter keeps, 0 where it has none."""

    name: str
    inputs: int
    outputs: int
    rank: int
    trained: int
    """Weights that its adapter has."""

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class LayerShape:
    """Widths in numbers a token.

    Attributes:
        hidden, query, key_value, intermediate: of the stream, of all queries, of all keys (or values), of the MLP.
        heads: of the queries.
        norms: of the whole hidden width; qk_norm: whether queries and keys have their own.
        gated: whether the MLP multiplies two projections.
        fused: whether q, k, v are one projection, and gate and up.
    """

    hidden: int
    query: int
    key_value: int
    intermediate: int
    heads: int
    norms: int
    qk_norm: bool
    gated: bool
    fused: bool
    attention_in: tuple[Projection, ...]
    attention_out: Projection
    mlp_in: tuple[Projection, ...]
    mlp_out: Projection

    @property
    def key_value_heads(self) -> int:
        return self.key_value * self.heads // self.query

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.attention_in, self.attention_out, *self.mlp_in, self.mlp_out)


def layer_shapes(shapes: ModelShapes, targets: list[Linear], adapter: AdapterSettings) -> list[LayerShape]:
    """The layers in the model's order."""
    per_layer = len(shapes.linears) // shapes.layers
    adapted = {target.name for target in targets}
    groups = [shapes.linears[start : start + per_layer] for start in range(0, len(shapes.linears), per_layer)]
    norms = sum(size == shapes.hidden and name.endswith(".weight") for name, size in shapes.norms.items())
    return [_layer(shapes, group, adapted, adapter, norms // shapes.layers) for group in groups]


def _layer(
    shapes: ModelShapes, linears: list[Linear], adapted: set[str], adapter: AdapterSettings, norms: int
) -> LayerShape:
    made = [_projection(linear, linear.name in adapted, adapter) for linear in linears]
    attention_in = tuple(p for p in made if p.name.endswith(_ATTENTION_IN))
    (attention_out,) = (p for p in made if p.name.endswith(_ATTENTION_OUT))
    mlp_in = tuple(p for p in made if p.name.endswith(_MLP_IN))
    total = sum(p.outputs for p in attention_in)
    prefix = linears[0].name.split(".self_attn")[0]
    return LayerShape(
        hidden=shapes.hidden,
        query=shapes.attention_width,
        key_value=(total - shapes.attention_width) // 2,
        intermediate=shapes.intermediate,
        heads=shapes.heads,
        norms=norms,
        qk_norm=f"{prefix}.self_attn.q_norm.weight" in shapes.norms,
        gated=sum(p.outputs for p in mlp_in) == 2 * shapes.intermediate,
        fused=len(attention_in) == 1,
        attention_in=attention_in,
        attention_out=attention_out,
        mlp_in=mlp_in,
        mlp_out=made[-1],
    )


def _projection(linear: Linear, adapted: bool, adapter: AdapterSettings) -> Projection:
    if not adapted:
        return Projection(linear.name, linear.in_features, linear.out_features, 0, 0)
    sizes = adapter.layer_sizes(linear.name, linear.in_features, linear.out_features)
    inner = max(1, max(sizes, default=1) // max(linear.in_features, linear.out_features))
    if adapter.keeps_output:
        inner += linear.out_features
    return Projection(linear.name, linear.in_features, linear.out_features, inner, sum(sizes))
