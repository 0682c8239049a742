"""Choosing the next token: the same adjustments, in the same order, as transformers' `generate`.

Repetition penalty, then temperature, then top-k, then top-p, then min-p, then one draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from qlora_runtime.decoder import FloatArray
from qlora_runtime.errors import ArgumentError, ModelOutputError

_HIGHEST = 1e38  # a score's, whatever the penalty


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends.

    Raises:
        ArgumentError: a value outside the range stated beside it.
    """

    max_new_tokens: int = 256  # at least 1
    temperature: float = 0.0  # 0: always the most probable token; else above 0
    top_k: int = 0  # keep the k most probable tokens; 0: keep all
    top_p: float = 1.0  # keep the most probable tokens that make up this probability; above 0, up to 1
    min_p: float = 0.0  # keep tokens at least this share as probable as the best; 0 (all) to 1 (the best)
    repetition_penalty: float = 1.0  # divides the logits of tokens already seen; above 0, 1 changes nothing
    seed: int | None = None  # at least 0: the same seed draws the same tokens; None: other ones each time
    stop: Sequence[str] = ()  # the answer ends before the first of these texts

    def __post_init__(self) -> None:
        _require(
            "max_new_tokens", self.max_new_tokens, "an integer of at least 1", _is_int(self.max_new_tokens, 1)
        )
        _require("temperature", self.temperature, "0 or more", _in_range(self.temperature, 0.0, float("inf")))
        _require("top_k", self.top_k, "an integer, 0 (all tokens) or more", _is_int(self.top_k, 0))
        _require(
            "top_p", self.top_p, "above 0 and up to 1", _in_range(self.top_p, 0.0, 1.0) and self.top_p > 0
        )
        _require("min_p", self.min_p, "from 0 to 1", _in_range(self.min_p, 0.0, 1.0))
        penalty = self.repetition_penalty
        _require(
            "repetition_penalty", penalty, "above 0", _in_range(penalty, 0.0, float("inf")) and penalty > 0
        )
        _require(
            "seed", self.seed, "None or an integer of at least 0", self.seed is None or _is_int(self.seed, 0)
        )
        listed = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        texts = listed and all(isinstance(text, str) and text for text in self.stop)
        _require("stop", self.stop, "a list of non-empty strings", texts)


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, history: Sequence[int], logits: FloatArray) -> int:
        """The next token id. history: the prompt and answer so far; logits: [vocab] float32.

        Raises:
            ModelOutputError: the logits are not all finite.
        """
        if not np.isfinite(logits).all():
            raise ModelOutputError(
                f"the model gave {np.count_nonzero(~np.isfinite(logits))} logits that are NaN or "
                f"infinite, after {len(history)} tokens. The weights or the profile overflow: verify "
                "the bundle, export again."
            )
        scores = adjust(self._sampling, history, logits)
        if self._sampling.temperature == 0:
            return int(scores.argmax())
        return self._draw(scores)

    def _draw(self, scores: FloatArray) -> int:
        """One token with the probabilities softmax(scores), by inverting their running sum."""
        weights = np.exp(scores.astype(np.float64) - scores.max())
        running = weights.cumsum()
        index = np.searchsorted(running, self._random.random() * running[-1], side="right")
        return int(min(index, np.flatnonzero(weights)[-1]))


def adjust(sampling: Sampling, history: Sequence[int], logits: FloatArray) -> FloatArray:
    """The scores to draw from, [vocab] float32, with -inf for tokens that are out.

    `logits` stays as it is.
    """
    scores = logits.astype(np.float32, copy=True)
    if sampling.repetition_penalty != 1.0 and len(history):
        penalize_repetition(scores, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores
    divide_by_temperature(scores, sampling.temperature)
    if 0 < sampling.top_k < scores.size:
        keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        keep_top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        keep_min_p(scores, sampling.min_p)
    return scores


def divide_by_temperature(scores: FloatArray, temperature: float) -> None:
    """In place, by a temperature above 0. Where quotients could overflow, the highest is made 0 first."""
    if temperature < 1e-2 or np.abs(scores).max() > 1e6:
        scores -= scores.max()
    with np.errstate(over="ignore"):  # to -inf, which is what is meant
        scores /= np.float32(max(temperature, 1e-37))


def penalize_repetition(scores: FloatArray, history: Sequence[int], penalty: float) -> None:
    """In place: make every token in `history` less probable, whatever its score's sign."""
    seen = np.unique(np.asarray(history, dtype=np.int64))
    wide = scores[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        penalized = np.where(wide < 0, wide * penalty, wide / penalty)
    scores[seen] = penalized.clip(-_HIGHEST, _HIGHEST)


def keep_top_k(scores: FloatArray, k: int) -> None:
    """In place: drop all scores below the k-th highest; equals of the k-th stay."""
    threshold = np.partition(scores, -k)[-k]
    scores[scores < threshold] = -np.inf


def keep_top_p(scores: FloatArray, p: float) -> None:
    """In place: drop the least probable tokens, as many as together have at most probability 1 - p."""
    ascending = scores.argsort(kind="stable")
    weights = np.exp(scores[ascending] - scores.max())
    running = (weights / weights.sum()).cumsum()
    drop = running <= 1.0 - p
    drop[-1] = False  # the most probable token always stays
    scores[ascending[drop]] = -np.inf


def keep_min_p(scores: FloatArray, p: float) -> None:
    """In place: drop tokens less than `p` times as probable as the most probable one (arXiv:2407.01082)."""
    scores[np.exp(scores - scores.max()) < np.float32(p)] = -np.inf


def _require(name: str, value: Any, allowed: str, holds: bool) -> None:
    if not holds:
        raise ArgumentError(f"{name} is {value!r}, allowed is {allowed}.")


def _is_int(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _in_range(value: Any, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Integers may be larger than any float, and scores are divided by floats.
    return low <= value <= high and (isinstance(value, float) or abs(value) < 2**63) and isfinite(value)
