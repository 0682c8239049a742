"""How far a bundle is from the trained model, and whether its profile allows that."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from qlora_runtime import Reference, Tolerance
from qlora_runtime.generating import GeneratingBundle
from qlora_runtime.verify import NO_GREEDY_TOKEN, Report, compare, scored_logits

from qlora_kit.export.perplexity import PerplexityRatio, TokenLosses, compare_perplexity
from qlora_kit.export.reference import ReferenceRow


@dataclass(frozen=True)
class Profile:
    """What a bundle of one kind may differ by.

    Attributes:
        reference: tolerance that the bundle carries, so that it can be checked again on other processors.
        max_perplexity_ratio: of bundle to reference, either way, on completions.
        max_ratio_all_tokens: the same where completions are too short to tell, and prompts are compared too. Rounding
            moves those further: nobody trained the model to say them.
        exact: nothing is rounded, so that every difference counts, be there one token or many. Otherwise a ratio is
            an estimate from the tokens at hand.
    """

    name: str
    reference: Tolerance
    max_perplexity_ratio: float
    max_ratio_all_tokens: float
    exact: bool

    def limit(self, ratio: PerplexityRatio) -> float:
        """What the ratio, or its inverse, may be."""
        return self.max_perplexity_ratio if ratio.over == "completions" else self.max_ratio_all_tokens


PROFILES = {
    "fp32": Profile("fp32", Tolerance(1e-3, 0.995, 2e-3, every_greedy_token=True), 1.0001, 1.0001, exact=True),
    "int8": Profile("int8", Tolerance(8.0, 0.90, 1.0, every_greedy_token=True), 1.005, 1.10, exact=False),
    "int4": Profile("int4", Tolerance(30.0, 0.75, 4.0, every_greedy_token=True), 1.10, 1.25, exact=False),
    "nf4": Profile("nf4", Tolerance(1e-3, 0.995, 2e-3, every_greedy_token=True), 1.002, 1.002, exact=True),
    "int4_fast": Profile("int4_fast", Tolerance(8.0, 0.90, 1.0, every_greedy_token=True), 1.005, 1.10, exact=False),
    "int4_exact": Profile(
        "int4_exact", Tolerance(1e-3, 0.995, 2e-3, every_greedy_token=True), 1.002, 1.002, exact=True
    ),
}


@dataclass(frozen=True)
class Distances:
    """Bundle against reference over all positions of all rows; logits in their own unit, KL in nats.

    Attributes:
        perplexity_ratio_low, perplexity_ratio_high: its bounds, two standard errors either way.
        perplexity_tokens, perplexity_over: how many predicted tokens, and which, the perplexities are of.
        training_rows: how many of the rows are not held out.
        calibration_rows: how many of those int8's ranges were measured on too.
        identical_codes: matrices whose codes and statistics were read back and are the training base's byte for byte;
            None in profiles that do not ship them.
        warnings: what these rows do not settle.
    """

    max_logit: float
    mean_logit: float
    mean_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    perplexity_tokens: int
    perplexity_over: Literal["completions", "all tokens"]
    greedy_tokens_compared: int
    greedy_tokens_equal: int
    rows: int
    training_rows: int
    calibration_rows: int
    positions: int
    identical_codes: int | None = None
    warnings: list[str] = field(default_factory=list)

    def rows_in_words(self) -> str:
        """How many rows, and how many of them the model was trained or the bundle calibrated on."""
        words = f"{self.rows} rows"
        if self.training_rows:
            words += f" ({self.training_rows} of them from training"
            words += f", {self.calibration_rows} of these calibrated on)" if self.calibration_rows else ")"
        return words

    def greedy_in_words(self) -> str:
        """How many greedy tokens are equal."""
        if not self.greedy_tokens_compared:
            return NO_GREEDY_TOKEN
        return f"greedy tokens {self.greedy_tokens_equal} of {self.greedy_tokens_compared} equal"

    def in_words(self) -> str:
        """What was compared, and how it came out."""
        return (
            f"{self.rows_in_words()}: largest logit difference {self.max_logit:.2g}, top-1 agreement "
            f"{self.top1_agreement:.2%}, perplexity ratio {self.perplexity_ratio:.6f} over {self.perplexity_tokens} "
            f"tokens, {self.greedy_in_words()}"
            + (f", codes of {self.identical_codes} matrices identical" if self.identical_codes else "")
        )

    def to_json(self) -> dict[str, object]:
        """All fields; null for numbers that are not finite."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def measure(bundle: GeneratingBundle, rows: list[ReferenceRow], profile: Profile) -> tuple[Distances, list[str]]:
    """Distances of an open bundle, and a sentence for each that is past the profile's tolerance."""
    sums = np.zeros(4)  # |difference|, KL, equal top-1, largest difference
    losses, seen = [], set[int]()
    for row in rows:
        logits = scored_logits(bundle, *row.read())  # [seq, vocab]
        difference = np.abs(logits - row.logits)
        log_p, log_q = log_softmax(row.logits), log_softmax(logits)
        sums[0] += difference.mean(axis=1).sum()
        sums[1] += (np.exp(log_p) * (log_p - log_q)).sum()
        sums[2] += (logits.argmax(1) == row.logits.argmax(1)).sum()
        sums[3] = np.maximum(sums[3], difference.max())  # which lets a NaN through, as max does not
        losses.append(_token_losses(row, log_p, log_q, seen))
    shipped = compare(bundle, Reference([row.shipped() for row in rows], profile.reference))
    # An exact bundle's completions count by themselves, however few.
    ratio = compare_perplexity(losses, min_loss_tokens=1) if profile.exact else compare_perplexity(losses)
    positions = sum(len(row.logits) for row in rows)
    distances = Distances(
        max_logit=float(sums[3]),
        mean_logit=float(sums[0] / positions),
        mean_kl=float(sums[1] / positions),
        top1_agreement=float(sums[2] / positions),
        **_perplexities(ratio),
        greedy_tokens_compared=shipped.greedy_tokens_compared,
        greedy_tokens_equal=shipped.greedy_tokens_equal,
        rows=len(rows),
        training_rows=sum(row.origin != "held_out" for row in rows),
        calibration_rows=0 if profile.exact else sum(row.origin == "calibration" for row in rows),
        positions=positions,
        warnings=_warnings(ratio, shipped, profile),
    )
    return distances, [*shipped.reasons, *_reasons(distances, ratio, profile)]


def tolerance_of(profile: Profile) -> dict[str, Any]:
    """The profile's limits, as the bundle's manifest records them."""
    return {
        **asdict(profile.reference),
        "max_perplexity_ratio": profile.max_perplexity_ratio,
        "max_ratio_all_tokens": profile.max_ratio_all_tokens,
    }


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[..., vocab] logits to log probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _token_losses(
    row: ReferenceRow, log_p: npt.NDArray[np.float64], log_q: npt.NDArray[np.float64], seen: set[int]
) -> TokenLosses:
    """Losses of the row's tokens but the first; log_p (reference), log_q (bundle): [seq, vocab].

    A template's opening is the same in every row. It says one thing, however often: a token whose whole context is in
    `seen` is left out. The row's contexts are added to `seen`.
    """
    context, fresh = hash(tuple(row.source_ids or ())), []
    for token in row.input_ids:
        context = hash((context, token))
        fresh.append(context not in seen)
        seen.add(context)
    places = np.flatnonzero(fresh[1:])
    targets = np.array(row.input_ids)[places + 1]
    in_completion = np.isin(places, row.loss_positions)
    return TokenLosses(targets, -log_q[places, targets], -log_p[places, targets], in_completion)


def _perplexities(ratio: PerplexityRatio) -> dict[str, Any]:
    """The ratio as Distances names it."""
    low, high = ratio.interval
    return {
        "perplexity": ratio.bundle,
        "reference_perplexity": ratio.reference,
        "perplexity_ratio": ratio.value,
        "perplexity_ratio_low": low,
        "perplexity_ratio_high": high,
        "perplexity_tokens": ratio.tokens,
        "perplexity_over": ratio.over,
    }


def _reasons(distances: Distances, ratio: PerplexityRatio, profile: Profile) -> list[str]:
    limits, reasons = profile.reference, []
    if not distances.max_logit <= limits.max_logit and profile.exact:
        reasons.append(f"a logit differs by {distances.max_logit:.3g}, allowed is {limits.max_logit}.")
    if not distances.top1_agreement >= limits.min_top1:
        reasons.append(f"top-1 agreement is {distances.top1_agreement:.4f}, required is {limits.min_top1}.")
    limit = profile.limit(ratio)
    if ratio.is_past(limit, profile.exact):
        reasons.append(f"{_in_words(ratio, profile.exact)}, allowed is {limit} either way.")
    return reasons


def _warnings(ratio: PerplexityRatio, shipped: Report, profile: Profile) -> list[str]:
    warnings = []
    limit = profile.limit(ratio)
    if not profile.exact and not ratio.is_past(limit, exact=False) and not ratio.is_resolved(limit):
        warnings.append(
            f"{_in_words(ratio, exact=False)}; whether it is within {limit} is not resolved by {ratio.tokens} tokens. "
            "More or longer rows, or a higher export.verify_prompts, would tell"
        )
    if not shipped.greedy_tokens_compared:
        warnings.append(NO_GREEDY_TOKEN)
    return warnings


def _in_words(ratio: PerplexityRatio, exact: bool) -> str:
    low, high = ratio.interval
    doubt = "" if exact else f" (between {low:.4f} and {high:.4f})"
    return f"perplexity of {ratio.over} is {ratio.value:.5f} times the reference's{doubt}"
