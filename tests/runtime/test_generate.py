"""Text from prompts and chats, and where it ends."""

from threading import Event

import pytest
from qlora_runtime import Sampling, stream_text
from qlora_runtime import decoder as decoder_module
from qlora_runtime.errors import PromptTooLongError
from qlora_runtime.generate import TextStream, find_stop, generate, unsure_length

from .tiny import CONTEXT_LENGTH, EOS

PROMPT = "The bridge was"


@pytest.fixture
def whole(bundle):
    """A greedy answer to PROMPT."""
    return generate(bundle, PROMPT, Sampling(max_new_tokens=24))


def test_an_answer_ends_at_its_length(bundle, whole):
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 24
    assert whole.text == bundle.tokenizer.decode(whole.token_ids)
    assert whole.prompt_tokens == len(bundle.tokenizer.encode(PROMPT))


def test_pieces_join_to_the_whole_answer(bundle, whole):
    stream = stream_text(bundle, PROMPT, Sampling(max_new_tokens=24))
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    assert stream.token_ids == whole.token_ids


def test_an_answer_ends_with_eos(bundle, whole, monkeypatch):
    last = whole.token_ids[6]
    monkeypatch.setitem(vars(bundle.manifest.model), "eos_token_ids", (EOS, last))
    answer = generate(bundle, PROMPT, Sampling(max_new_tokens=24))
    end = whole.token_ids.index(last)
    assert answer.finish_reason == "eos"
    assert answer.token_ids == whole.token_ids[: end + 1]
    assert answer.text == bundle.tokenizer.decode(whole.token_ids[:end])


@pytest.mark.parametrize("length", [1, 3])
def test_an_answer_ends_before_a_stop_string(bundle, whole, length):
    stop = whole.text[8 : 8 + length]
    at = whole.text.index(stop)
    answer = generate(bundle, PROMPT, Sampling(max_new_tokens=24, stop=["never said", stop]))
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[:at]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 24


def test_a_stop_string_begun_and_not_finished_is_text(bundle, whole):
    stop = whole.text[-2:] + "and never this"
    answer = generate(bundle, PROMPT, Sampling(max_new_tokens=24, stop=[stop]))
    assert (answer.text, answer.finish_reason) == (whole.text, "length")


def test_an_answer_ends_where_the_context_is_full(bundle):
    prompt = "The bridge was " * 12
    assert CONTEXT_LENGTH - 30 < len(bundle.tokenizer.encode(prompt)) < CONTEXT_LENGTH
    answer = generate(bundle, prompt, Sampling(max_new_tokens=200))
    assert answer.finish_reason == "context"
    assert answer.prompt_tokens + len(answer.token_ids) == CONTEXT_LENGTH


def test_a_prompt_longer_than_the_context_is_refused(bundle):
    with pytest.raises(PromptTooLongError, match="Shorten"):
        generate(bundle, "The bridge was " * 100)


def test_a_chat_is_answered_with_its_template(bundle, tiny):
    messages = [{"role": "user", "content": "Where?"}]
    ids = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = list(bundle.stream(ids, Sampling(max_new_tokens=8)))
    assert generate(bundle, messages, Sampling(max_new_tokens=8)).token_ids == expected


@pytest.mark.parametrize(
    ("text", "stops", "at"),
    [("abc", ["c"], 2), ("abcb", ["cb", "b"], 1), ("abc", ["x"], None), ("abc", [], None)],
)
def test_finding_the_first_stop(text, stops, at):
    assert find_stop(text, stops) == at


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [
        ("hello <", ["<end>"], 1),
        ("hello <en", ["<end>", "x"], 3),
        ("aa", ["aab"], 2),
        ("a", [], 0),
        ("", ["a"], 0),
    ],
)
def test_what_could_still_become_a_stop(text, stops, length):
    assert unsure_length(text, stops) == length


def test_a_stop_string_before_an_unfinished_character_is_not_given_out(bundle):
    """The text waits for the character's other bytes; where they never come, the stop string still counts."""
    sampling = Sampling(max_new_tokens=24)
    tokens = bundle.tokenizer.encode("stone") + bundle.tokenizer.encode("é")[:1]
    stream = TextStream(bundle, bundle.encode_prompt(PROMPT), Sampling(max_new_tokens=24, stop=["one"]))
    stream._tokens = (token for token in tokens)
    assert "".join(stream) == "st"
    assert stream.finish_reason == "stop"
    stream = TextStream(bundle, bundle.encode_prompt(PROMPT), sampling)
    stream._tokens = (token for token in tokens)
    assert "".join(stream) == "stone\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("start", range(0, 20, 3))
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_no_piece_holds_a_stop_string_wherever_its_tokens_begin(bundle, whole, start, length):
    stop = whole.text[start : start + length]
    pieces = list(stream_text(bundle, PROMPT, Sampling(max_new_tokens=24, stop=[stop])))
    assert "".join(pieces) == whole.text[: whole.text.index(stop)]


def test_a_stream_that_is_closed_frees_its_cache(bundle, caches):
    stream = stream_text(bundle, PROMPT)
    next(stream)
    assert caches and all(value() is not None for value in caches)
    stream.close()
    assert all(value() is None for value in caches)
    assert list(stream) == []


def test_a_stream_that_is_cancelled_reads_no_further_piece_of_its_prompt(bundle, monkeypatch):
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 2)
    cancelled, read = Event(), []
    real = decoder_module.Decoding.read

    def read_and_cancel(self, ids):
        read.append(len(ids))
        if len(read) == 2:
            cancelled.set()
        return real(self, ids)

    monkeypatch.setattr(decoder_module.Decoding, "read", read_and_cancel)
    assert list(bundle.stream(range(5, 15), cancelled=cancelled)) == []
    assert read == [2, 2]
