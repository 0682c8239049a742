"""How the linear layers of a bundle are stored, by profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qlora_kit.export.codes import CODED_BASES, EXACT_LEVEL, FAST_LEVEL, Coded, CodedLayer
from qlora_kit.export.grid4 import round_4bit
from qlora_kit.export.linear import Float, Form, Linear
from qlora_kit.export.nbits import BLOCK_SIZE, Rounded4, Rounded8
from qlora_kit.export.parameters import MergedWeights

BITS_4, BITS_8 = 4 + (16 + 4) / BLOCK_SIZE, 8 + 16 / BLOCK_SIZE
"""Bits of a weight, with its share of scale and zero point."""
BUDGET = 5.0
"""Bits a weight of int4, on average over all linear layers but the head."""

Choose = Callable[[list[Linear], MergedWeights], Mapping[str, Form]]


@dataclass(frozen=True)
class Forms:
    """The form of each linear layer.

    Attributes:
        other: of those that `choose` gives none.
        choose: looks at all layers, before any is written; layer name to form.
        packs: whether layers of one input may be one product.
        packs_all: packs gate and up too, whose product is split again; q, k and v need no split.
        shares_head: a head that is the embedding is stored once, as `Float`.
        embeds_codes: embeddings are 8-bit codes, those of the head where they are one.
    """

    other: Form
    choose: Choose = field(default=lambda linears, weights: {})
    packs: Callable[[list[Linear]], bool] = field(default=lambda linears: True)
    packs_all: bool = False
    shares_head: bool = False
    embeds_codes: bool = False


def forms_of(profile: str, coded: Mapping[str, CodedLayer], moments: Mapping[str, Tensor]) -> Forms:
    """The forms of a profile.

    Args:
        coded: the training base's 4-bit layers, for profiles that ship their codes.
        moments: second moments of the inputs of layers, for `int4`.
    """
    if profile in CODED_BASES:
        return _coded_forms(profile, coded)
    if profile == "int4":

        def choose(linears: list[Linear], weights: MergedWeights) -> Mapping[str, Form]:
            return eight_bit_layers(linears, weights, moments)

        return Forms(Rounded4(moments), choose, embeds_codes=True)
    return Forms(Rounded8(), embeds_codes=True) if profile == "int8" else Forms(Float(), shares_head=True)


def _coded_forms(profile: str, layers: Mapping[str, CodedLayer]) -> Forms:
    """Layers that have codes keep them. Packing saves operators, of which small models at one token have many."""
    packs, fast = profile != "nf4", profile == "int4_fast"
    coded = Coded(layers, FAST_LEVEL if fast else EXACT_LEVEL)

    def choose(linears: list[Linear], weights: MergedWeights) -> Mapping[str, Form]:
        return {linear.layer: coded for linear in linears if coded.all_of([linear])}

    return Forms(
        Rounded8() if fast else Float(),
        choose,
        packs=lambda linears: packs and coded.all_of(linears),
        packs_all=packs,
        shares_head=not fast,
        embeds_codes=fast,
    )


def eight_bit_layers(
    linears: list[Linear], weights: MergedWeights, moments: Mapping[str, Tensor], budget: float = BUDGET
) -> dict[str, Form]:
    """The layers that get 8 bit within `budget` bits a weight: the head, then those that 4 bit costs most.

    The cost is the share of a layer's output that rounding changes, with inputs taken as unrelated, over its size.
    """
    body = [linear for linear in linears if not _is_head(linear)]
    sizes = {linear.layer: 0 for linear in body}
    costs: dict[str, float] = {}
    for linear in body:
        weight = linear.weight(weights)
        sizes[linear.layer] = weight.numel()
        moment = moments.get(linear.layer)
        diagonal = moment.diagonal() if moment is not None and moment.dim() == 2 else moment
        counts = 1.0 if diagonal is None else diagonal
        error = weight - round_4bit(weight, BLOCK_SIZE).dequantize(weight.shape[1])
        costs[linear.layer] = float((error.square() * counts).sum() / (weight.square() * counts).sum().clamp_min(1e-30))
    room = (budget - BITS_4) * sum(sizes.values())
    chosen: dict[str, Form] = {linear.layer: Rounded8() for linear in linears if _is_head(linear)}
    for name in sorted(sizes, key=lambda layer: costs[layer] / sizes[layer], reverse=True):
        if (extra := (BITS_8 - BITS_4) * sizes[name]) <= room:
            chosen[name] = Rounded8()
            room -= extra
    return chosen


def _is_head(linear: Linear) -> bool:
    return linear.prefix.startswith("lm_head")
