"""The best answer to a question, from the start and end logits of the windows over its context."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_runtime.windows import NULL, Window

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class TokenSpan:
    """Tokens first to last of one window, and the sum of their start and end logits."""

    first: int
    last: int
    logit: float


@dataclass(frozen=True)
class Answer:
    """An answer as it stands in the context, at characters [start, end); empty, at 0, where there is none.

    `score` is its probability: softmax of the start logits times softmax of the end logits, each over the
    contexts of all windows (and each window's first token, where a text may hold no answer).
    """

    text: str
    start: int
    end: int
    score: float


def best_span(
    start_logits: FloatArray, end_logits: FloatArray, context: tuple[int, int], max_answer_tokens: int
) -> TokenSpan | None:
    """The span of up to `max_answer_tokens` tokens with the highest sum; None in an empty context.

    Args:
        start_logits, end_logits: [seq].
        context: tokens [first, end) that may be in an answer.
    """
    first, stop = context
    if first >= stop:
        return None
    starts = start_logits[first:stop].astype(np.float64)  # [context]
    ends = end_logits[first:stop].astype(np.float64)
    length = min(max_answer_tokens, len(starts))
    padded = np.concatenate([ends, np.full(length - 1, -np.inf)])
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, length)  # [context, length]
    place, more = divmod(int(sums.argmax()), length)
    return TokenSpan(first + place, first + place + more, float(sums[place, more]))


def null_logit(start_logits: FloatArray, end_logits: FloatArray) -> float:
    """What a window's first token says for "no answer in here"."""
    return float(start_logits[NULL]) + float(end_logits[NULL])


def choose_answer(
    context: str,
    windows: Sequence[Window],
    logits: Sequence[tuple[FloatArray, FloatArray]],
    max_answer_tokens: int,
    unanswerable: bool,
) -> Answer:
    """The best answer over all windows of one question.

    Where a text may hold no answer, there is none if every window's first token has more than the best span
    (Devlin et al. 2018, section 4.3, with a threshold of 0).

    Args:
        logits: (start logits, end logits) of each window, [seq] each.
    """
    found = [
        best_span(start, end, window.context, max_answer_tokens)
        for window, (start, end) in zip(windows, logits, strict=True)
    ]
    spans = [(span, window) for span, window in zip(found, windows, strict=True) if span is not None]
    best, window = max(spans, key=lambda pair: pair[0].logit, default=(None, None))
    null = min(null_logit(start, end) for start, end in logits)
    normalizer = _log_sum(windows, logits, 0, unanswerable) + _log_sum(windows, logits, 1, unanswerable)
    if best is None or window is None or (unanswerable and null > best.logit):
        return Answer("", 0, 0, float(np.exp(null - normalizer)) if unanswerable else 0.0)
    start, end = _without_spaces(
        context, int(window.offsets[best.first, 0]), int(window.offsets[best.last, 1])
    )
    return Answer(context[start:end], start, end, float(np.exp(best.logit - normalizer)))


def _log_sum(
    windows: Sequence[Window], logits: Sequence[tuple[FloatArray, FloatArray]], side: int, unanswerable: bool
) -> float:
    """Logarithm of the sum of exp of the start (side 0) or end (side 1) logits that can be chosen."""
    chosen = [pair[side][slice(*window.context)] for window, pair in zip(windows, logits, strict=True)]
    if unanswerable:
        chosen += [pair[side][NULL : NULL + 1] for pair in logits]
    values = np.concatenate(chosen).astype(np.float64)
    highest = values.max(initial=-np.inf)
    return float(highest + np.log(np.exp(values - highest).sum())) if np.isfinite(highest) else 0.0


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) without white space at its ends, which byte-level tokens may carry."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())
