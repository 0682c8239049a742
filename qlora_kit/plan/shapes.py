"""The parameters of a causal language model, by name, from its config.json alone: no torch, no weights.

Names and sizes are those of transformers' modules (v5), which the tests compare for every architecture here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_kit.errors import ModelError

Config = dict[str, Any]


@dataclass(frozen=True)
class Linear:
    """A linear projection; its weight holds in_features * out_features numbers whichever way round it is stored."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass
class ModelShapes:
    """What a model is made of.

    Attributes:
        linears: all projections of the layers, in the model's order; the output head is not among them.
        head: the output head; its weight is the embedding's where `tied`.
        embeddings: parameter name to number of weights.
        norms: parameter name to number of weights.
        hidden, layers, vocab: width, depth and rows of the vocabulary.
        attention_width, intermediate: inputs of a layer's output and down projections.
        heads: of a layer's queries.
    """

    hidden: int
    layers: int
    vocab: int
    attention_width: int
    intermediate: int
    heads: int
    head: Linear
    tied: bool
    linears: list[Linear] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)
    norms: dict[str, int] = field(default_factory=dict)

    def parameters(self) -> dict[str, int]:
        """Every parameter's name and number of weights; a tied head is not listed twice."""
        found = dict(self.embeddings)
        for linear in [*self.linears, *([] if self.tied else [self.head])]:
            found[f"{linear.name}.weight"] = linear.weights
            if linear.bias:
                found[f"{linear.name}.bias"] = linear.out_features
        return found | self.norms


@dataclass(frozen=True)
class _Family:
    """In what a family with Llama's layout differs from Llama."""

    tied: bool = False
    head_dim: int | None = None
    qkv_bias: bool | None = None
    """None: config.attention_bias decides, and for the output projection too."""
    qk_norm: bool = False
    extra_norms: tuple[str, ...] = ()
    fused: bool = False


_GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_dim=128, qk_norm=True),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(tied=True, head_dim=256, extra_norms=_GEMMA_NORMS),
    "gemma3_text": _Family(tied=True, head_dim=256, qk_norm=True, extra_norms=_GEMMA_NORMS),
    "phi3": _Family(qkv_bias=False, fused=True),
}
ARCHITECTURES = (*_FAMILIES, "gpt2")
"""`model_type`s whose shapes are known."""


def model_shapes(config: Config) -> ModelShapes:
    """The shapes of the model a config.json describes.

    Raises:
        ModelError: an architecture not in `ARCHITECTURES`, or a config without a field that its shapes need.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError("plan does not know this architecture", got=kind, allowed=", ".join(ARCHITECTURES))
    return _gpt2(config) if kind == "gpt2" else _llama_like(config, _FAMILIES[kind])


def _llama_like(config: Config, family: _Family) -> ModelShapes:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_dim = config.get("head_dim") or family.head_dim or hidden // heads
    key_value_heads = config.get("num_key_value_heads") or heads
    intermediate = _number(config, "intermediate_size")
    layers, vocab = _number(config, "num_hidden_layers"), _number(config, "vocab_size")
    shapes = ModelShapes(
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        attention_width=heads * head_dim,
        intermediate=intermediate,
        heads=heads,
        head=Linear("lm_head", hidden, vocab),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        embeddings={"model.embed_tokens.weight": vocab * hidden},
    )
    attention_bias = bool(config.get("attention_bias", False)) if family.qkv_bias is None else False
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    attention = _attention(hidden, heads * head_dim, key_value_heads * head_dim, qkv_bias, attention_bias, family.fused)
    mlp = _mlp(hidden, intermediate, bool(config.get("mlp_bias", False)), family.fused)
    norms = ("input_layernorm", "post_attention_layernorm", *family.extra_norms)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes.linears += [
            Linear(prefix + linear.name, linear.in_features, linear.out_features, linear.bias)
            for linear in (*attention, *mlp)
        ]
        shapes.norms |= {f"{prefix}{norm}.weight": hidden for norm in norms}
        if family.qk_norm:
            shapes.norms |= {f"{prefix}self_attn.{norm}.weight": head_dim for norm in ("q_norm", "k_norm")}
    shapes.norms["model.norm.weight"] = hidden
    return shapes


def _attention(hidden: int, q: int, kv: int, qkv_bias: bool, out_bias: bool, fused: bool) -> list[Linear]:
    """`q` and `kv` are the widths of queries and of keys (or values), all heads together."""
    parts = {"qkv_proj": q + 2 * kv} if fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    inputs = [Linear(f"self_attn.{name}", hidden, width, qkv_bias) for name, width in parts.items()]
    return [*inputs, Linear("self_attn.o_proj", q, hidden, out_bias)]


def _mlp(hidden: int, intermediate: int, bias: bool, fused: bool) -> list[Linear]:
    parts = {"gate_up_proj": 2 * intermediate} if fused else {"gate_proj": intermediate, "up_proj": intermediate}
    inputs = [Linear(f"mlp.{name}", hidden, width, bias) for name, width in parts.items()]
    return [*inputs, Linear("mlp.down_proj", intermediate, hidden, bias)]


def _gpt2(config: Config) -> ModelShapes:
    hidden, layers, vocab = (_number(config, key) for key in ("n_embd", "n_layer", "vocab_size"))
    inner = config.get("n_inner") or 4 * hidden
    shapes = ModelShapes(
        hidden=hidden,
        layers=layers,
        vocab=vocab,
        attention_width=hidden,
        intermediate=inner,
        heads=_number(config, "n_head"),
        head=Linear("lm_head", hidden, vocab),
        tied=bool(config.get("tie_word_embeddings", True)),
        embeddings={
            "transformer.wte.weight": vocab * hidden,
            "transformer.wpe.weight": _number(config, "n_positions") * hidden,
        },
    )
    parts = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        shapes.linears += [Linear(prefix + name, *size, bias=True) for name, size in parts.items()]
        shapes.norms |= {f"{prefix}{norm}.{part}": hidden for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes.norms |= {f"transformer.ln_f.{part}": hidden for part in ("weight", "bias")}
    return shapes


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"the config of this {config['model_type']} model has no usable {key}", got=value, allowed="1 or more"
        )
    return value
