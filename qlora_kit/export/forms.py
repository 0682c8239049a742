"""How the linear layers of a bundle are stored, by profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_kit.export.codes import CodedLayer
from qlora_kit.export.linear import Float, Form, Linear
from qlora_kit.export.nbits import Rounded8


@dataclass(frozen=True)
class Forms:
    """The form of each linear layer.

    Attributes:
        other: of those that `layers` does not name.
        packs_attention: q, k and v may be one product.
        shares_head: a head that is the embedding is stored once; it is then `Float`.
    """

    other: Form
    layers: Mapping[str, Form] = field(default_factory=dict)
    packs_attention: bool = True
    shares_head: bool = True

    def of(self, linear: Linear) -> Form:
        """The form of one layer."""
        return self.layers.get(linear.layer, self.other)


def forms_of(profile: str, coded: Mapping[str, CodedLayer]) -> Forms:
    """The forms of a profile.

    Args:
        coded: the training base's 4-bit layers, for `nf4`.
    """
    if profile == "nf4":
        return Forms(Float(), coded, packs_attention=False)
    if profile == "int8":
        return Forms(Rounded8(), shares_head=False)
    return Forms(Float())
