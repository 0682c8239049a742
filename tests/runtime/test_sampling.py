"""Sampling against transformers' logits processors, and against the probabilities it promises."""

import numpy as np
import pytest
import torch
from qlora_runtime import Sampling
from qlora_runtime.errors import ArgumentError, ModelOutputError
from qlora_runtime.sampling import Sampler, adjust
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .tiny import random_ids

VOCAB = 500


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.0, top_k=7), [TopKLogitsWarper(7)]),
        (Sampling(temperature=1.0, top_k=VOCAB + 1), [TopKLogitsWarper(VOCAB + 1)]),
        (Sampling(temperature=1.0, top_p=0.9), [TopPLogitsWarper(0.9)]),
        (Sampling(temperature=1.0, top_p=1e-6), [TopPLogitsWarper(1e-6)]),
        (Sampling(temperature=1.0, min_p=0.03), [MinPLogitsWarper(0.03)]),
        (Sampling(temperature=1.0, min_p=1.0), [MinPLogitsWarper(1.0)]),
        (Sampling(temperature=1.0, repetition_penalty=1.4), [RepetitionPenaltyLogitsProcessor(1.4)]),
        (
            Sampling(temperature=1.7, top_k=50, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(1.7),
                TopKLogitsWarper(50),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_scores_equal_transformers_processors(sampling, processors, seed):
    logits, history = random_logits(seed), random_ids(seed, 12)
    expected = LogitsProcessorList(processors)(torch.from_numpy(history)[None], torch.from_numpy(logits.copy())[None])[
        0
    ].numpy()
    scores = adjust(sampling, history.tolist(), logits)
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(expected))
    np.testing.assert_allclose(scores[np.isfinite(scores)], expected[np.isfinite(expected)], rtol=1e-6)


def test_adjusting_leaves_the_logits_as_they_were():
    logits = random_logits(0)
    before = logits.copy()
    adjust(Sampling(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0), [1, 2], logits)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    draws = np.bincount([sampler.choose([], logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(draws, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # over 4 standard deviations


def test_tokens_that_are_out_are_never_drawn():
    logits = random_logits(1)
    allowed = set(np.argsort(logits)[-3:].tolist())
    sampler = Sampler(Sampling(temperature=5.0, top_k=3, seed=0))
    assert {sampler.choose([], logits) for _ in range(2_000)} == allowed


def test_greedy_takes_the_first_of_equals():
    assert Sampler(Sampling()).choose([], np.array([1.0, 3.0, 3.0], dtype=np.float32)) == 1


def test_the_same_seed_draws_the_same_tokens(bundle):
    def answer(seed: int | None) -> list[int]:
        sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=seed)
        return list(bundle.stream(random_ids(0, 5), sampling, stop_at_eos=False))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(None) != answer(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", "text"),
        ("stop", [""]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ArgumentError, match=f"^{name} is .*allowed is"):
        Sampling(**{name: value})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = random_logits(0)
    logits[17] = bad
    with pytest.raises(ModelOutputError, match="1 logits that are NaN or infinite, after 2 tokens"):
        Sampler(Sampling()).choose([3, 4], logits)


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-40, 5e-324, 1e30])
@pytest.mark.parametrize("penalty", [1.0, 1e-300, 1e300])
def test_extreme_values_overflow_nowhere(temperature, penalty):
    """A hundredth of a degree is as good as greedy; a penalty of any size keeps scores finite."""
    logits = random_logits(3)
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, seed=0)
    scores = adjust(sampling, [1, 2, 3], logits)
    assert scores.max() < np.inf and not np.isnan(scores).any()
    drawn = Sampler(sampling).choose([1, 2, 3], logits)
    if temperature <= 1e-2:
        assert drawn == adjust(Sampling(repetition_penalty=penalty), [1, 2, 3], logits).argmax()


@pytest.mark.parametrize("stop", [3, "ab", None, [3]])
def test_stop_is_a_list_of_texts(stop):
    with pytest.raises(ArgumentError, match="list of non-empty strings"):
        Sampling(stop=stop)
