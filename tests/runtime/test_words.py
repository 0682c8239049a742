"""Words as tokens, their first ones, and spans of BIO tags."""

from __future__ import annotations

import numpy as np
import pytest
from qlora_runtime.errors import ArgumentError
from qlora_runtime.words import NO_TOKEN, WordEncoder, bio_spans, first_tokens, split_words
from tiny_tasks import SENTENCES, task_tokenizer


@pytest.mark.parametrize("arch", ["bert", "roberta", "llama"])
def test_words_are_encoded_as_transformers_does(arch):
    tokenizer = task_tokenizer(arch)
    spaced = task_tokenizer(arch)
    if arch != "bert":  # what transformers asks for before it takes words
        spaced.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    encoder = WordEncoder(tokenizer.backend_tokenizer, 512)
    for words in SENTENCES:
        (row,) = encoder.encode(words)
        expected = spaced(words, is_split_into_words=True)
        assert row.input_ids.tolist() == expected["input_ids"]
        owners = expected.word_ids()
        assert row.places.tolist() == [owners.index(word) for word in range(len(words))]


def test_a_long_sentence_is_cut_between_words():
    tokenizer = task_tokenizer("bert")
    words = SENTENCES[3]
    (whole,) = WordEncoder(tokenizer.backend_tokenizer, 512).encode(words)
    rows = WordEncoder(tokenizer.backend_tokenizer, 20).encode(words)
    assert len(rows) > 2 and all(len(row.input_ids) <= 20 for row in rows)
    assert [row.first_word for row in rows] == np.cumsum([0, *(len(row.places) for row in rows)])[:-1].tolist()
    inner = [token for row in rows for token in row.input_ids[1:-1].tolist()]
    assert inner == whole.input_ids[1:-1].tolist()
    firsts = [row.input_ids[place] for row in rows for place in row.places]
    assert firsts == whole.input_ids[whole.places].tolist()


def test_a_word_longer_than_a_row_is_cut_itself():
    rows = WordEncoder(task_tokenizer("roberta").backend_tokenizer, 6).encode(["the", "qxzqxzqxz", "x"])
    assert [row.places.tolist() for row in rows] == [[1], [1], [1]]
    start, end = 0, 2  # <s>, </s>
    assert len(rows[1].input_ids) == 6 and rows[1].input_ids[[0, -1]].tolist() == [start, end]


def test_a_word_without_tokens_has_no_place():
    (row,) = WordEncoder(task_tokenizer("bert").backend_tokenizer, 40).encode(["a", "\x01", "b"])
    assert row.places[1] == NO_TOKEN and row.places[0] == 1 and row.places[2] == 2
    assert first_tokens([None, 1, 1, 0, None], 3).tolist() == [3, 1, NO_TOKEN]


def test_no_words_and_no_room_are_refused():
    with pytest.raises(ArgumentError, match="without words, at least one"):
        WordEncoder(task_tokenizer("bert").backend_tokenizer, 40).encode([])
    with pytest.raises(ArgumentError, match="max_seq_len is 2, which has no room"):
        WordEncoder(task_tokenizer("bert").backend_tokenizer, 2)


def test_raw_text_is_split_into_words_and_marks():
    text = "Don't ask well-known Bob\u2019s friends, 3 \u00e9t\u00e9s."
    words = split_words(text)
    assert [word.text for word in words] == [
        "Don't", "ask", "well-known", "Bob\u2019s", "friends", ",", "3", "\u00e9t\u00e9s", ".",
    ]  # fmt: skip
    assert all(text[word.start : word.end] == word.text for word in words)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", []),
        ("O O", []),
        ("B-a I-a O B-a", [("a", 0, 2), ("a", 3, 4)]),
        ("B-a B-a I-b", [("a", 0, 1), ("a", 1, 2), ("b", 2, 3)]),
        ("I-a I-a O I-b-c", [("a", 0, 2), ("b-c", 3, 4)]),
        ("B-a O I-a", [("a", 0, 1), ("a", 2, 3)]),
    ],
)
def test_spans_of_tags(tags, spans):
    assert [(span.type, span.start, span.end) for span in bio_spans(tags.split())] == spans
