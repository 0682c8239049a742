"""What a LoRA adapter adds to each weight, as plain fp32 factors: read from a stored adapter, and written again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_kit.adapters.files import CONFIG, PREFIX
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import StoredAdapter
from qlora_kit.errors import AdapterError

A, B = ".lora_A.weight", ".lora_B.weight"
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?[AB](?:\.(weight\w*))?")
"""A factor's key, without PEFT's prefix: of a linear layer, convolution, embedding, or a weight of an LSTM or GRU."""


@dataclass(frozen=True)
class Place:
    """Where a delta's factors lie in a file.

    Attributes:
        layer: its name; an LSTM or GRU has several deltas, of one rank.
        a, b: keys of the factors, with PEFT's prefix.
        kernel: of a convolution, whose a is [rank, in, *kernel] and whose b ends in as many ones.
    """

    layer: str
    a: str
    b: str
    kernel: tuple[int, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether the delta is one of a linear layer's weight [out, in]."""
        return self.a.endswith(A) and not self.kernel


@dataclass(frozen=True)
class Delta:
    """scaling · b a, for a weight [out, in]. a [rank, in] and b [out, rank], float32."""

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.b), self.a.shape[1]

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        return self.scaling * (self.b @ self.a)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U [out, k], S [k] falling, Vᵀ [k, in]) of the delta, k at most its rank, without a matrix [out, in].

        With b = Q_b R_b and aᵀ = Q_a R_a, b a is Q_b (R_b R_aᵀ) Q_aᵀ: only the core [k, k] is decomposed.
        """
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, s, vh = torch.linalg.svd(self.scaling * (r_b @ r_a.T), full_matrices=False)
        return q_b @ u, s, vh @ q_a.T

    def norm(self) -> float:
        """Frobenius norm."""
        return (self.scaling * (torch.linalg.qr(self.b).R @ torch.linalg.qr(self.a.T).R.T)).norm().item()

    def truncated(self, rank: int) -> tuple[Delta, float]:
        """The nearest delta of `rank` at most, and the share of the norm that is lost (0 to 1)."""
        return truncate(self.svd(), rank)

    def minus(self, other: Delta) -> Delta:
        """self - other, of the ranks' sum."""
        return concatenate([self, other], [1.0, -1.0])


def concatenate(deltas: list[Delta], weights: list[float]) -> Delta:
    """The weighted sum of deltas, exact: ranks add up, weight and scaling go into a."""
    a = torch.cat([weight * delta.scaling * delta.a for delta, weight in zip(deltas, weights, strict=True)])
    return Delta(a, torch.cat([delta.b for delta in deltas], dim=1))


def truncate(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Delta, float]:
    """The first `rank` terms of (U, S, Vᵀ), roots of S on both sides, and the share of the norm that is lost."""
    u, s, vh = svd
    root = s[:rank].sqrt()
    lost = s[rank:].norm() / s.norm().clamp_min(1e-30)
    return Delta(root[:, None] * vh[:rank], u[:, :rank] * root), lost.item()


def nearest(matrix: Tensor, rank: int) -> tuple[Delta, float]:
    """The nearest delta of `rank` at most to a whole matrix [out, in], and the share of the norm that is lost.

    From the eigenvectors of the smaller of M Mᵀ and Mᵀ M, made sharper by one step of subspace iteration, which takes
    a fraction of the time of a singular value decomposition of M. In fp32 these tell values below 3e-4 of the largest
    no longer apart, which moves the result by less than that.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned, lost = nearest(matrix.T, rank)
        return Delta(turned.b.T, turned.a.T), lost
    b = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    b = torch.linalg.qr(matrix @ (matrix.T @ b)).Q
    a = b.T @ matrix  # rows [rank, in] as long as their singular values
    lost = (matrix - b @ a).norm() / matrix.norm().clamp_min(1e-30)
    root = a.norm(dim=1).sqrt()
    return Delta(a / root.clamp_min(1e-30)[:, None], b * root), lost.item()


def read_places(stored: StoredAdapter) -> dict[str, Place]:
    """Where the deltas of a stored LoRA adapter lie, by the names that `read_deltas` gives them."""
    places: dict[str, Place] = {}
    for key in sorted(stored.tensors):
        if found := FACTOR.fullmatch(key.removeprefix(PREFIX)):
            layer, kind, weight = found.groups(default="")
            ending = f".{weight}" if weight else ""
            a, b = (f"{PREFIX}{layer}.lora_{kind}{side}{ending}" for side in "AB")
            kernel = tuple(stored.tensors[a].shape[2:]) if a in stored.tensors else ()
            places[layer if weight in ("", "weight") else layer + ending] = Place(layer, a, b, kernel)
    return places


def read_deltas(stored: StoredAdapter, origin: Path) -> dict[str, Delta]:
    """Name to delta of a stored LoRA adapter, in fp32, whatever it is stored in.

    Named as the layer is; of an LSTM or GRU each weight has one, LAYER.WEIGHT. A convolution's is that of its kernels
    laid flat, [out, in · kernel]; an embedding's that of its transpose, [dim, vocab].

    Raises:
        AdapterError: it is of another method, or a tensor is missing, does not fit the configuration or is not finite.
    """
    if stored.method is not Lora:
        raise AdapterError(
            f"{origin} is a {stored.method.__name__} adapter: what it does to a weight is not B A alone",
            allowed="adapters of ordinary LoRA",
            fix="Of the others only PiSSA, LoftQ and QA-LoRA become such, by qlora-kit adapters convert",
        )
    settings = Lora.read_config(stored.config, stored.tensors, origin / CONFIG)
    other_tensors(stored, origin)
    deltas = {}
    for name, place in read_places(stored).items():
        a, b = (_factor(stored, key, origin) for key in (place.a, place.b))
        layer = settings.for_layer(place.layer)
        if not len(a) == b.shape[1] == layer.rank:
            raise AdapterError(
                f"{origin}: {name}: ranks of lora_A and lora_B",
                got=(len(a), b.shape[1]),
                allowed=f"{layer.rank}, as {CONFIG} says",
            )
        deltas[name] = Delta(a.float(), b.float(), layer.scaling)
    return deltas


def _factor(stored: StoredAdapter, key: str, origin: Path) -> Tensor:
    """float [rank, in · kernel], or [out, rank]."""
    tensor = stored.tensors.get(key)
    if tensor is None:
        raise AdapterError(f"{origin}: tensor {key} is missing", fix="Save the adapter again")
    if tensor.dim() < 2:
        raise AdapterError(f"{origin}: shape of {key}", got=list(tensor.shape), allowed="a matrix or a kernel")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{origin}: {key} holds NaN or Inf", fix="Use an earlier checkpoint")
    return tensor.flatten(1)


def other_tensors(stored: StoredAdapter, origin: Path) -> dict[str, Tensor]:
    """What an adapter holds beside its deltas: modules trained in full and trained biases, by PEFT's names.

    Raises:
        AdapterError: among them are LoRA tensors of something unknown.
    """
    factors = {key for place in read_places(stored).values() for key in (place.a, place.b)}
    found = {key: tensor for key, tensor in stored.tensors.items() if key not in factors}
    strange = next((key for key in found if ".lora_" in key), None)
    if strange:
        raise AdapterError(f"{origin}: {strange} is no factor of a delta, which is not supported")
    return found


def layer_ranks(deltas: Mapping[str, Delta], places: Mapping[str, Place]) -> dict[str, int]:
    """Layer name to its rank: the largest of its deltas'."""
    ranks: dict[str, int] = {}
    for name, delta in deltas.items():
        layer = places[name].layer
        ranks[layer] = max(delta.rank, ranks.get(layer, 0))
    return ranks


def delta_tensors(deltas: Mapping[str, Delta], places: Mapping[str, Place], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors as they lie in a file, in `dtype`; their scaling belongs to the configuration.

    Where a layer has several, those of a smaller rank are filled up with zeros.
    """
    ranks, tensors = layer_ranks(deltas, places), {}
    for name, delta in deltas.items():
        place = places[name]
        filled = ranks[place.layer] - delta.rank
        a, b = pad(delta.a, (0, 0, 0, filled)).to(dtype), pad(delta.b, (0, filled)).to(dtype)
        tensors[place.a] = a.reshape(len(a), -1, *place.kernel).contiguous()
        tensors[place.b] = b.reshape(*b.shape, *(1 for _ in place.kernel)).contiguous()
    return dict(sorted(tensors.items()))
