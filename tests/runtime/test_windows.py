"""Windows over contexts, and the best answer in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from qlora_runtime.errors import PromptTooLongError
from qlora_runtime.spans import best_span, choose_answer, null_logit
from qlora_runtime.windows import QuestionWindows, Window
from tiny_tasks import CONTEXT, QUESTIONS, task_tokenizer


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_windows_are_those_of_transformers(arch):
    tokenizer = task_tokenizer(arch)
    windows = QuestionWindows(tokenizer.backend_tokenizer, 40, 8)
    for question, context in QUESTIONS:
        found = windows.encode(f" {question}\n", context)
        expected = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=40,
            stride=8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert [window.input_ids.tolist() for window in found] == expected["input_ids"]
        for place, window in enumerate(found):
            of_context = [at for at, part in enumerate(expected.sequence_ids(place)) if part == 1]
            assert window.context == (of_context[0], of_context[-1] + 1)
            assert [tuple(pair) for pair in window.offsets.tolist()] == expected["offset_mapping"][place]
    assert len(windows.encode(*QUESTIONS[0])) > 2


def test_every_answer_is_found_in_a_window_that_holds_it():
    windows = QuestionWindows(task_tokenizer("roberta").backend_tokenizer, 60, 20).encode("Where?", CONTEXT)
    start = CONTEXT.index("ferryman counted")
    end = start + len("ferryman counted")
    spans = [window.tokens_of(start, end) for window in windows]
    assert any(span is None for span in spans)
    found = [(window, span) for window, span in zip(windows, spans, strict=True) if span is not None]
    assert found
    for window, (first, last) in found:
        assert CONTEXT[window.offsets[first, 0] : window.offsets[last, 1]].strip() == "ferryman counted"


def test_a_question_that_leaves_no_room_is_refused():
    windows = QuestionWindows(task_tokenizer("bert").backend_tokenizer, 24, 8)
    with pytest.raises(PromptTooLongError, match=r"leaves \d+ of 24 for the context; at least 8"):
        windows.encode(CONTEXT, "The bridge.")


def test_beside_a_long_question_windows_share_less():
    tokenizer = task_tokenizer("bert")
    question = "Where does the road end?"
    room = 40 - len(tokenizer(question, add_special_tokens=False)["input_ids"]) - 3
    rows = QuestionWindows(tokenizer.backend_tokenizer, 40, 100).encode(question, CONTEXT)
    first, second = (row.input_ids[slice(*row.context)].tolist() for row in rows[:2])
    assert first[-(room // 2) :] == second[: room // 2]


def test_best_span_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for length, limit in itertools.product((1, 2, 9), (1, 3, 30)):
        starts, ends = draw.normal(size=(2, length + 4)).astype(np.float32)
        span = best_span(starts, ends, (2, 2 + length), limit)
        candidates = [
            (float(starts[first]) + float(ends[last]), first, last)
            for first in range(2, 2 + length)
            for last in range(first, min(first + limit, 2 + length))
        ]
        assert (span.logit, span.first, span.last) == pytest.approx(max(candidates))
    assert best_span(starts, ends, (3, 3), 5) is None


def window_of(offsets: list[tuple[int, int]]) -> Window:
    """A first token such as [CLS], then the context's."""
    ids = np.arange(len(offsets) + 1)
    return Window(ids, ids * 0, np.array([(0, 0), *offsets]), (1, len(offsets) + 1))


def test_the_answer_is_the_best_of_all_windows_without_spaces_around_it():
    windows = [window_of([(0, 3), (3, 8)]), window_of([(3, 8), (8, 12)])]
    low, high = np.array([0.0, 1, 2]), np.array([0.0, 5, 1])
    answer = choose_answer("The road ends", windows, [(low, low), (high, high)], 2, unanswerable=False)
    assert (answer.text, answer.start, answer.end) == ("road", 4, 8)
    share = np.exp(5) / np.exp([1, 2, 5, 1]).sum()
    assert answer.score == pytest.approx(share * share)


def test_no_answer_where_every_window_says_so():
    windows = [window_of([(0, 3)]), window_of([(4, 8)])]
    sure, unsure = np.array([9.0, 1.0]), np.array([0.0, 1.0])
    both = [(sure, sure), (sure, sure)]
    assert choose_answer("The road", windows, both, 5, unanswerable=True).text == ""
    assert choose_answer("The road", windows, both, 5, unanswerable=False).text == "The"
    assert choose_answer("The road", windows, [(sure, sure), (unsure, unsure)], 5, unanswerable=True).text == "The"
    assert null_logit(sure, sure) == 18
    empty = Window(np.arange(2), np.zeros(2), np.zeros((2, 2), dtype=np.int64), (2, 2))
    answer = choose_answer("", [empty], [(sure, sure)], 5, unanswerable=True)
    assert (answer.text, answer.score) == ("", 1.0)
