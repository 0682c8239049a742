"""How far a bundle is from the trained model, and whether its profile allows that."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from qlora_runtime import Bundle, Reference, Tolerance
from qlora_runtime.verify import compare

from qlora_kit.export.reference import ReferenceRow


@dataclass(frozen=True)
class Profile:
    """What a bundle of one kind may differ by.

    Attributes:
        reference: tolerance that the bundle carries, so that it can be checked again on other processors.
        max_perplexity_ratio: of bundle to reference, either way, on the held-out completions.
    """

    name: str
    reference: Tolerance
    max_perplexity_ratio: float


PROFILES = {
    "fp32": Profile("fp32", Tolerance(max_logit=1e-3, min_top1=0.995, greedy_margin=2e-3), 1.0001),
    "int8": Profile("int8", Tolerance(max_logit=8.0, min_top1=0.90, greedy_margin=1.0), 1.005),
}


@dataclass(frozen=True)
class Distances:
    """Bundle against reference over all positions of all rows; logits in their own unit, KL in nats."""

    max_logit: float
    mean_logit: float
    mean_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    greedy_tokens_compared: int
    greedy_tokens_equal: int
    rows: int
    positions: int


def measure(bundle: Bundle, rows: list[ReferenceRow], profile: Profile) -> tuple[Distances, list[str]]:
    """Distances of an open bundle, and a sentence for each that is past the profile's tolerance."""
    sums = np.zeros(4)  # |difference|, KL, equal top-1, largest difference
    losses = np.zeros(2)  # bundle, reference
    positions = loss_tokens = 0
    for row in rows:
        logits = bundle.logits([row.input_ids])[0]  # [seq, vocab]
        difference = np.abs(logits - row.logits)
        log_p, log_q = log_softmax(row.logits), log_softmax(logits)
        sums[0] += difference.mean(axis=1).sum()
        sums[1] += (np.exp(log_p) * (log_p - log_q)).sum()
        sums[2] += (logits.argmax(1) == row.logits.argmax(1)).sum()
        sums[3] = np.maximum(sums[3], difference.max())  # which lets a NaN through, as max does not
        targets = np.array(row.input_ids)[np.array(row.loss_positions) + 1]
        losses -= [log_q[row.loss_positions, targets].sum(), log_p[row.loss_positions, targets].sum()]
        positions, loss_tokens = positions + len(row.input_ids), loss_tokens + len(targets)
    shipped = compare(bundle, Reference([row.shipped() for row in rows], profile.reference))
    perplexity, reference_perplexity = np.exp(losses / max(1, loss_tokens))
    ratio = float(perplexity / reference_perplexity)
    distances = Distances(
        max_logit=float(sums[3]),
        mean_logit=float(sums[0] / positions),
        mean_kl=float(sums[1] / positions),
        top1_agreement=float(sums[2] / positions),
        perplexity=float(perplexity),
        reference_perplexity=float(reference_perplexity),
        perplexity_ratio=ratio,
        greedy_tokens_compared=shipped.greedy_tokens_compared,
        greedy_tokens_equal=shipped.greedy_tokens_equal,
        rows=len(rows),
        positions=positions,
    )
    return distances, [*shipped.reasons, *_reasons(distances, profile)]


def tolerance_of(profile: Profile) -> dict[str, float]:
    """The profile's limits, as the bundle's manifest records them."""
    return {**asdict(profile.reference), "max_perplexity_ratio": profile.max_perplexity_ratio}


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[..., vocab] logits to log probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _reasons(distances: Distances, profile: Profile) -> list[str]:
    limits, reasons = profile.reference, []
    if not distances.max_logit <= limits.max_logit and profile.name == "fp32":
        reasons.append(f"a logit differs by {distances.max_logit:.3g}, allowed is {limits.max_logit}.")
    if not distances.top1_agreement >= limits.min_top1:
        reasons.append(f"top-1 agreement is {distances.top1_agreement:.4f}, required is {limits.min_top1}.")
    ratio = max(distances.perplexity_ratio, 1 / max(distances.perplexity_ratio, 1e-30))
    if not ratio <= profile.max_perplexity_ratio:
        reasons.append(
            f"perplexity is {distances.perplexity_ratio:.5f} times the reference's, allowed is "
            f"{profile.max_perplexity_ratio} either way."
        )
    return reasons
