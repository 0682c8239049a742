"""What an adapter learned, layer by layer, and what two adapters have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapter_tools.sources import Source, as_lora
from qlora_kit.adapters.deltas import Delta, read_deltas, read_places
from qlora_kit.adapters.layer import LINEAR, weight_expander
from qlora_kit.adapters.spectrum import amplification, directions, effective_rank, energy_rank, overlap
from qlora_kit.errors import AdapterError, QloraKitError
from qlora_kit.model.load import load_base
from qlora_kit.model.source import find_base
from qlora_kit.train.restore import load_run_base

FORMAT = "qlora-inspect/1"
ReadWeight = Callable[[str], Tensor]


@dataclass(frozen=True)
class Overlap:
    """Of two deltas of one layer: phi(i, j), [rank, other rank], on the input's side (right singular vectors) and on
    the output's (left). Hu et al. 2021 take the right ones of A alone; those of the delta do not depend on how the
    product is split. `by_chance` is what two random subspaces of these ranks come to."""

    input: list[list[float]]
    output: list[list[float]]
    input_by_chance: float
    output_by_chance: float


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter; norms are Frobenius norms.

    Attributes:
        weight_norm: of the base's weight, None where the base is not there.
        amplification: the delta's norm over the weight's in the delta's directions (Hu et al. 2021, section 7.3).
        values: singular values, falling.
        energy_rank: singular values that hold 90% of the sum of squares.
        overlap: with the other adapter's delta of this layer.
    """

    name: str
    rank: int
    norm: float
    weight_norm: float | None
    amplification: float | None
    values: list[float]
    effective_rank: float
    energy_rank: int
    overlap: Overlap | None

    @property
    def kind(self) -> str:
        """`q_proj` of `model.layers.3.self_attn.q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def block(self) -> int | None:
        """3 of `model.layers.3.self_attn.q_proj`."""
        number = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(number[1]) if number else None

    @property
    def ratio(self) -> float | None:
        """‖Δ‖ / ‖W‖."""
        return None if self.weight_norm is None else self.norm / max(self.weight_norm, 1e-30)


@dataclass(frozen=True)
class Inspection:
    """An adapter looked at. `notes` say what could not be looked at, and why."""

    adapter: Source
    layers: list[Layer]
    other: Source | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        sources = {"adapter": self.adapter, "other": self.other}
        named = {
            key: {"folder": str(source.folder), "sha256": source.sha256, "base": source.base} if source else None
            for key, source in sources.items()
        }
        layers = [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return {"format": FORMAT, **named, "notes": self.notes, "layers": layers}


@torch.no_grad()
def inspect(adapter: Source, other: Source | None = None, base: bool = False) -> Inspection:
    """Measures every layer.

    Args:
        other: an adapter to compare with, on a base of the same shapes.
        base: load the base too, as the run trained on it, else as the adapter names it; noted where it is not found.

    Raises:
        AdapterError: an adapter is not LoRA, PiSSA, LoftQ or QA-LoRA, or the two have no layer in common.
    """
    notes: list[str] = []
    deltas = _linear_deltas(adapter, notes)
    others = _linear_deltas(other, notes) if other else {}
    weight = _weights(adapter, notes) if base else None
    if other and not deltas.keys() & others.keys():
        raise AdapterError(
            f"{adapter.folder} and {other.folder} have no layer in common", fix="Compare adapters of one base"
        )
    alone = len(others.keys() ^ deltas.keys()) if other else 0
    if alone:
        notes.append(f"{alone} layers are in one of the two adapters only: they have no overlap")
    layers = [_measure(name, delta, others.get(name), weight) for name, delta in deltas.items()]
    layers.sort(key=lambda layer: (-1 if layer.block is None else layer.block, layer.name))
    return Inspection(adapter, layers, other, notes)


def _linear_deltas(source: Source, notes: list[str]) -> dict[str, Delta]:
    """Of linear layers, to the plain base; a note names others, whose delta is no matrix of the layer's own shape."""
    stored = as_lora(source)
    places = read_places(stored)
    if others := {place.layer for place in places.values() if not place.is_linear}:
        notes.append(f"{source.folder}: left out, as they are no linear layers: {', '.join(sorted(others))}")
    return {name: delta for name, delta in read_deltas(stored, source.folder).items() if places[name].is_linear}


def _measure(name: str, delta: Delta, other: Delta | None, read_weight: ReadWeight | None) -> Layer:
    u, s, vh = delta.svd()
    weight = read_weight(name) if read_weight else None
    if weight is not None and weight.shape != delta.shape:
        raise AdapterError(
            f"{name}: shape of the delta", got=list(delta.shape), allowed=f"{list(weight.shape)}, the base's"
        )
    return Layer(
        name=name,
        rank=delta.rank,
        norm=s.norm().item(),
        weight_norm=None if weight is None else weight.norm().item(),
        amplification=None if weight is None or not s.any() else amplification((u, s, vh), weight),
        values=s.tolist(),
        effective_rank=effective_rank(s),
        energy_rank=energy_rank(s),
        overlap=_overlap(name, delta, other) if other else None,
    )


def _overlap(name: str, delta: Delta, other: Delta) -> Overlap | None:
    """None where one of the two is zero: it has no directions."""
    if delta.shape != other.shape:
        raise AdapterError(
            f"{name}: the adapters are for weights of different shapes",
            got=[list(delta.shape), list(other.shape)],
            fix="Compare adapters of one base",
        )
    (u, s, vh), (other_u, other_s, other_vh) = delta.svd(), other.svd()
    if not s.any() or not other_s.any():
        return None
    output = overlap(directions(u, s), directions(other_u, other_s))
    input_ = overlap(directions(vh.T, s), directions(other_vh.T, other_s))
    most = max(input_.shape)
    return Overlap(_rounded(input_), _rounded(output), most / delta.shape[1], most / delta.shape[0])


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _weights(adapter: Source, notes: list[str]) -> ReadWeight | None:
    """Reads the base's weights [out, in] in fp32 by layer name; None, and a note, where the base cannot be loaded."""
    try:
        model = load_run_base(adapter.run) if adapter.run else load_base(find_base(adapter.base))
    except QloraKitError as error:
        notes.append(f"no weights to compare with: {error}")
        return None
    modules = dict(model.named_modules())

    def read(name: str) -> Tensor:
        module = modules.get(name)
        if not isinstance(module, LINEAR):
            raise AdapterError(f"{adapter.folder}: its base {adapter.base} has no linear layer {name}")
        return weight_expander(module)(torch.float32)

    return read
