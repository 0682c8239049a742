"""Rows of the text tasks as tokens: what the tokenizer itself makes of them, and labels in their place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from qlora_runtime.words import WordEncoder
from tiny_encoders import CLS, SEP, tiny_byte_level, tiny_wordpiece
from tiny_models import tiny_tokenizer

from qlora_kit.data.examples import RowError
from qlora_kit.data.masking import IGNORED
from qlora_kit.data.task_examples import Answer, LabelledText, QuestionOnText, SourceTarget, TaggedWords
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection
from qlora_kit.task_settings import TASKS
from qlora_kit.tasks.registry import task_of
from qlora_kit.tasks.task import Task

TAGS = ["O", "B-PER", "I-PER"]
WORDS = ("Anna", "sold", "ferryman's", "seventyseven", "boats", "!")
CONTEXT = "Anna sold seven boats in Lisbon. The ferryman counted his coins in Porto by the evening. " * 3


def task(kind: str, labels: list[str] | None = None, **settings: Any) -> Task[Any]:
    return task_of(TASKS[kind].model_validate(settings), labels or [])


def section(**fields: Any) -> DataSection:
    return DataSection.model_validate({"train": "rows.jsonl", "max_seq_len": 64} | fields)


def test_pairs_are_the_tokenizers_own() -> None:
    tokenizer, own = tiny_wordpiece(), task("classification", ["bad", "good"])
    texts = [("A good film", "Who built it?"), ("bad", "Where did she sell them?")]
    rows = [own.encode(LabelledText(*pair, "good"), tokenizer, section())[0] for pair in texts]
    batch = own.collate(rows, tokenizer)
    expected = tokenizer(*zip(*texts), padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert {name for name in batch if name != "labels"} == set(expected)
    assert all((batch[name] == expected[name]).all() for name in expected)
    assert batch["labels"].tolist() == [1, 1]


def test_single_texts_have_one_type() -> None:
    tokenizer, own = tiny_wordpiece(), task("regression")
    batch = own.collate(own.encode(LabelledText("A bad film", None, 2.5), tokenizer, section()), tokenizer)
    assert not batch["token_type_ids"].any()
    assert batch["labels"].tolist() == [2.5]


def test_a_long_pair_is_cut_or_refused() -> None:
    tokenizer, own = tiny_wordpiece(), task("regression")
    example = LabelledText("stone iron " * 9, "river", 1.0)
    row = own.encode(example, tokenizer, section(max_seq_len=16, overlong="truncate"))[0]
    assert (len(row.input_ids), row.truncated) == (16, True)
    assert row.input_ids.tolist()[-1] == SEP
    with pytest.raises(RowError, match=r"tokens, more than data.max_seq_len 16"):
        own.encode(example, tokenizer, section(max_seq_len=16, overlong="error"))


def test_several_labels_of_a_row() -> None:
    own, tokenizer = task("classification", ["a", "b", "c"], multi_label=True), tiny_wordpiece()
    rows = [own.encode(LabelledText("stone", None, names), tokenizer, section())[0] for names in ((), ("c", "a"))]
    assert own.collate(rows, tokenizer)["labels"].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_unknown_labels_are_refused(kind: str) -> None:
    example: Any = LabelledText("x", None, "B-PRE") if kind == "classification" else TaggedWords(("x",), ("B-PRE",))
    with pytest.raises(RowError, match=r"'B-PRE', which is not among the labels.*Did you mean"):
        task(kind, TAGS).encode(example, tiny_wordpiece(), section())


@pytest.mark.parametrize("tokenizer", [tiny_wordpiece(), tiny_byte_level()], ids=["word pieces", "bytes"])
def test_a_words_first_token_carries_its_tag(tokenizer: Any) -> None:
    tags = ("B-PER", "O", "B-PER", "I-PER", "O", "O")
    own = task("tagging", TAGS)
    row = own.encode(TaggedWords(WORDS, tags), tokenizer, section())[0]
    theirs = tokenizer(list(WORDS), is_split_into_words=True)
    assert row.input_ids.tolist() == theirs["input_ids"]
    word_ids, before = theirs.word_ids(), [None, *theirs.word_ids()]
    expected = [
        IGNORED if word is None or word == last else TAGS.index(tags[word]) for word, last in zip(word_ids, before)
    ]
    assert row.labels.tolist() == expected
    assert own.shown(row, tokenizer).lower().startswith("anna⟦b-per⟧ sold ferryman")


def test_the_runtime_splits_as_training_does() -> None:
    tokenizer = tiny_byte_level()
    row = task("tagging", TAGS).encode(TaggedWords(WORDS, ("O",) * 6), tokenizer, section())[0]
    runtime = WordEncoder(tokenizer.backend_tokenizer, 64).encode(WORDS)[0]
    assert row.input_ids.tolist() == runtime.input_ids.tolist()
    assert np.flatnonzero(row.labels != IGNORED).tolist() == runtime.places.tolist()


def test_a_sentence_is_cut_between_words() -> None:
    tokenizer, own = tiny_wordpiece(), task("tagging", TAGS)
    whole = own.encode(TaggedWords(WORDS, ("O",) * 6), tokenizer, section())[0]
    second_word = int(np.flatnonzero(whole.labels != IGNORED)[3])
    cut = section(max_seq_len=second_word + 2, overlong="truncate")  # a token more than three words and [SEP] need
    row = own.encode(TaggedWords(WORDS, ("O",) * 6), tokenizer, cut)[0]
    assert row.truncated
    assert row.input_ids.tolist() == [*whole.input_ids[:second_word].tolist(), SEP]
    assert (row.labels != IGNORED).sum() == 3
    with pytest.raises(RowError, match=f"{len(whole.input_ids)} tokens, more than data.max_seq_len {second_word + 2}"):
        own.encode(TaggedWords(WORDS, ("O",) * 6), tokenizer, section(max_seq_len=second_word + 2, overlong="error"))


def test_all_windows_of_a_sentence_are_evaluated() -> None:
    tokenizer, own, example = tiny_wordpiece(), task("tagging", TAGS), TaggedWords(WORDS, ("B-PER", *["O"] * 5))
    whole = own.encode(example, tokenizer, section())[0]
    rows = own.encode_whole(example, tokenizer, section(max_seq_len=16, overlong="error"))
    assert len(rows) > 1 and all(len(row.input_ids) <= 16 for row in rows)
    for part in ("input_ids", "labels"):
        inner = [getattr(row, part)[1:-1] for row in rows]  # without [CLS] and [SEP]
        assert np.concatenate(inner).tolist() == getattr(whole, part)[1:-1].tolist()
    [first] = own.encode(example, tokenizer, section(max_seq_len=16, overlong="truncate"))
    assert first.input_ids.tolist() == rows[0].input_ids.tolist() and first.truncated


def test_a_word_longer_than_a_row_is_cut_too() -> None:
    long = TaggedWords(("riverriverriver" * 2,), ("B-PER",))
    row = task("tagging", TAGS).encode(long, tiny_wordpiece(), section(max_seq_len=8, overlong="truncate"))[0]
    assert row.truncated and len(row.input_ids) == 8
    assert row.labels.tolist() == [IGNORED, 1, *[IGNORED] * 6]


def test_words_without_tokens_are_refused() -> None:
    with pytest.raises(RowError, match="the tokenizer makes nothing of these words"):
        task("tagging", TAGS).encode(TaggedWords(("\u200b", "\u0007"), ("O", "O")), tiny_wordpiece(), section())


@pytest.mark.parametrize("tokenizer", [tiny_wordpiece(), tiny_byte_level()], ids=["word pieces", "bytes"])
@pytest.mark.parametrize("text", ["Porto", "Lisbon. The ferryman", "his coins"])
def test_windows_point_to_the_answer_or_to_cls(tokenizer: Any, text: str) -> None:
    own = task("question_answering", stride=8)
    start = CONTEXT.index(text, 100)
    example = QuestionOnText("Where was it?", CONTEXT, (Answer(text, start), Answer("Anna", 0)))
    rows = own.encode(example, tokenizer, section(max_seq_len=48))
    assert len(rows) > 2 and all(len(row.input_ids) <= 48 for row in rows)
    found, empty = ([row for row in rows if bool(row.labels[1]) == there] for there in (True, False))
    assert found and empty
    for row in found:
        first, last = row.labels
        assert tokenizer.decode(row.input_ids[first : last + 1]).strip().lower() == text.lower()
        assert "⟦" in own.shown(row, tokenizer)
    assert all(row.labels.tolist() == [0, 0] for row in empty)
    assert "no answer in this window" in own.shown(empty[0], tokenizer)


def test_a_short_context_is_one_window_as_the_tokenizer_makes_it() -> None:
    tokenizer, own = tiny_wordpiece(), task("question_answering", unanswerable=True)
    rows = own.encode(QuestionOnText("Where was it?", "In Porto.", ()), tokenizer, section())
    batch = own.collate(rows, tokenizer)
    expected = tokenizer("Where was it?", "In Porto.", pad_to_multiple_of=8, padding=True)
    assert {name: batch[name][0].tolist() for name in expected} == dict(expected)
    assert batch["labels"].tolist() == [[0, 0]]


def test_a_long_question_is_refused() -> None:
    example = QuestionOnText("where " * 20, CONTEXT, (Answer("Anna", 0),))
    with pytest.raises(RowError, match=r"which leaves .* for the context.*data.overlong: skip"):
        task("question_answering").encode(example, tiny_wordpiece(), section(max_seq_len=24))


def test_questions_need_a_first_token_that_means_none() -> None:
    example = QuestionOnText("where", CONTEXT, (Answer("Anna", 0),))
    with pytest.raises(DataError, match=r"writes no \[CLS\] first.*BERT, RoBERTa"):
        task("question_answering").encode(example, tiny_tokenizer(), section())


def test_sources_have_their_prefix_and_targets_their_end() -> None:
    tokenizer, own = tiny_wordpiece("bart"), task("seq2seq", source_prefix="sell: ")
    row = own.encode(SourceTarget("seven boats", "Lisbon"), tokenizer, section())[0]
    assert row.input_ids.tolist() == tokenizer("sell: seven boats")["input_ids"]
    assert row.labels.tolist() == tokenizer(text_target="Lisbon")["input_ids"]
    assert (row.labels[0], row.labels[-1]) == (CLS, SEP)
    plain = tiny_tokenizer()  # writes no end itself
    row = own.encode(SourceTarget("seven boats", "sea"), plain, section())[0]
    assert row.labels.tolist() == [*plain("sea")["input_ids"], plain.eos_token_id]


def test_targets_of_a_batch_are_padded_without_loss() -> None:
    tokenizer, own = tiny_wordpiece("bart"), task("seq2seq")
    rows = [own.encode(SourceTarget("x", text), tokenizer, section())[0] for text in ("sea", "the river ran")]
    batch = own.collate(rows, tokenizer)
    assert (batch["labels"][0, len(rows[0].labels) :] == IGNORED).all()
    assert own.count(batch) == sum(len(row.labels) for row in rows)


def test_a_target_that_is_cut_has_no_end() -> None:
    tokenizer, own = tiny_wordpiece("bart"), task("seq2seq", max_target_len=4)
    example = SourceTarget("x", "the river ran under the bridge")
    row = own.encode(example, tokenizer, section(overlong="truncate"))[0]
    assert row.truncated and len(row.labels) == 4 and SEP not in row.labels
    with pytest.raises(RowError, match=r"more than task.max_target_len 4.*data.overlong"):
        own.encode(example, tokenizer, section(overlong="error"))
