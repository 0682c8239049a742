"""Tokens one by one: the cache changes nothing, and greedy answers are those of transformers' generate."""

import gc

import numpy as np
import pytest
import torch
from qlora_runtime import Sampling
from qlora_runtime import decoder as decoder_module
from qlora_runtime.decoder import Decoding
from qlora_runtime.errors import ArgumentError, PromptTooLongError

from .tiny import CONTEXT_LENGTH, EOS, PAD, random_ids


def transformers_greedy(tiny, prompt: np.ndarray, new_tokens: int, **options) -> list[int]:
    ids = torch.from_numpy(prompt)[None]
    output = tiny.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=PAD,
        **options,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("piece", [1, 3, 256])
def test_decoding_with_a_cache_equals_one_forward(bundle, monkeypatch, piece):
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", piece)
    ids = random_ids(1, 20)
    expected = bundle.logits(ids[None])[0]
    decoding = Decoding(bundle._decoder, capacity=20)
    np.testing.assert_allclose(decoding.read(ids[:13]), expected[12], atol=1e-4)
    for position in range(13, 20):
        np.testing.assert_allclose(decoding.read(ids[position : position + 1]), expected[position], atol=1e-4)


def test_a_full_cache_refuses_more_tokens(bundle):
    decoding = Decoding(bundle._decoder, capacity=4)
    decoding.read(random_ids(0, 4))
    with pytest.raises(ValueError, match="room for 0"):
        decoding.read(random_ids(0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers_generate(bundle, tiny, seed):
    prompt = random_ids(seed, 5 + seed)
    ours = list(bundle.stream(prompt, Sampling(max_new_tokens=40)))
    assert ours == transformers_greedy(tiny, prompt, 40)


def test_greedy_with_repetition_penalty_equals_transformers_generate(bundle, tiny):
    prompt = random_ids(7, 6)
    ours = list(bundle.stream(prompt, Sampling(max_new_tokens=30, repetition_penalty=1.3)))
    assert ours == transformers_greedy(tiny, prompt, 30, repetition_penalty=1.3)
    assert ours != transformers_greedy(tiny, prompt, 30)


def test_the_stream_ends_with_eos_and_only_there(bundle, monkeypatch):
    """Every token is made an eos in turn: the stream ends with its first occurrence."""
    prompt = random_ids(3, 8)
    whole = list(bundle.stream(prompt, Sampling(max_new_tokens=10), stop_at_eos=False))
    for token in set(whole):
        model = bundle.manifest.model
        monkeypatch.setitem(vars(model), "eos_token_ids", (EOS, token))
        assert list(bundle.stream(prompt, Sampling(max_new_tokens=10))) == whole[: whole.index(token) + 1]


def test_the_stream_ends_where_the_context_is_full(bundle):
    prompt = random_ids(2, CONTEXT_LENGTH - 3)
    assert len(list(bundle.stream(prompt, Sampling(max_new_tokens=50), stop_at_eos=False))) == 3


def test_a_prompt_that_leaves_no_room_is_refused_at_once(bundle):
    with pytest.raises(PromptTooLongError, match=f"{CONTEXT_LENGTH} tokens and the model's context"):
        bundle.stream(random_ids(0, CONTEXT_LENGTH))


def test_an_empty_prompt_is_refused_at_once(bundle):
    with pytest.raises(ArgumentError, match="at least one token"):
        bundle.stream(np.array([], dtype=np.int64))


def test_two_streams_do_not_disturb_each_other(bundle):
    prompts = [random_ids(4, 6), random_ids(5, 9)]
    sampling = Sampling(max_new_tokens=12)
    alone = [list(bundle.stream(prompt, sampling, stop_at_eos=False)) for prompt in prompts]
    streams = [bundle.stream(prompt, sampling, stop_at_eos=False) for prompt in prompts]
    assert list(zip(*streams, strict=True)) == list(zip(*alone, strict=True))


def test_the_cache_lives_as_long_as_the_decoding(bundle, caches):
    """Older onnxruntime (1.23) neither copies nor keeps what is bound: a lost cache is a crash or worse."""
    decoding = Decoding(bundle._decoder, capacity=8)
    gc.collect()
    assert caches
    assert all(value() is not None for value in caches)
    del decoding
    gc.collect()
    assert all(value() is None for value in caches)
