"""Windows of tokens over long contexts, for question answering.

Training and running use this same code, on the same `tokenizers` tokenizer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qlora_runtime.errors import PromptTooLongError
from qlora_runtime.tokenizer import check_text, plain_copy

Int64Array = npt.NDArray[np.int64]

MIN_CONTEXT_TOKENS = 8  # of a window: fewer answer nothing
NULL = 0  # the token that start and end point to where a window holds no answer: the first, such as [CLS]


@dataclass(frozen=True)
class Window:
    """A question and a part of its context, as the model sees them.

    Attributes:
        input_ids, type_ids: int64 [seq], special tokens included.
        offsets: int64 [seq, 2], the characters of the context that a token stands for.
        context: tokens [first, end) that are the context's.
    """

    input_ids: Int64Array
    type_ids: Int64Array
    offsets: Int64Array
    context: tuple[int, int]

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last token of the context's characters [start, end); None where not all are in here."""
        first, stop = self.context
        starts, ends = self.offsets[first:stop, 0], self.offsets[first:stop, 1]
        if not len(starts) or starts[0] > start or ends[-1] < end:
            return None
        # By overlap: a token may begin with the space before it, or hold more than the answer.
        touched = np.flatnonzero((ends > start) & (starts < end) & (ends > starts))
        return (first + int(touched[0]), first + int(touched[-1])) if touched.size else None


class QuestionWindows:
    """Questions with their contexts as rows of at most `max_seq_len` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, stride: int) -> None:
        """A copy of `tokenizer` is used; two windows of a long context share `stride` tokens."""
        self._tokenizer = plain_copy(tokenizer)
        self._max_seq_len, self._stride = max_seq_len, stride

    def encode(self, question: str, context: str) -> list[Window]:
        """The windows over `context`, each after the whole question without the white space around it.

        Beside a long question windows share fewer tokens: at most half of what there is room for.

        Raises:
            PromptTooLongError: the question leaves room for fewer than MIN_CONTEXT_TOKENS.
            ArgumentError: the question or the context holds half a surrogate pair.
        """
        check_text(question, context)
        question = question.strip()
        asked = len(self._tokenizer.encode(question, add_special_tokens=False).ids)
        room = self._max_seq_len - asked - self._tokenizer.num_special_tokens_to_add(True)
        if room < MIN_CONTEXT_TOKENS:
            raise PromptTooLongError(
                f"the question has {asked} tokens, which leaves {max(room, 0)} of {self._max_seq_len} for "
                f"the context; at least {MIN_CONTEXT_TOKENS} are needed. Shorten the question."
            )
        stride = min(self._stride, room // 2)
        self._tokenizer.enable_truncation(self._max_seq_len, stride=stride, strategy="only_second")
        whole = self._tokenizer.encode(question, context)
        self._tokenizer.no_truncation()
        return [_window(part) for part in (whole, *whole.overflowing)]


def _window(encoding: object) -> Window:
    """From an Encoding of the tokenizers package, whose type has no annotations."""
    ids: list[int] = encoding.ids  # type: ignore[attr-defined]
    sequences: list[int | None] = encoding.sequence_ids  # type: ignore[attr-defined]
    of_context = [place for place, sequence in enumerate(sequences) if sequence == 1]
    return Window(
        np.array(ids, dtype=np.int64),
        np.array(encoding.type_ids, dtype=np.int64),  # type: ignore[attr-defined]
        np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),  # type: ignore[attr-defined]
        (of_context[0], of_context[-1] + 1) if of_context else (len(ids), len(ids)),
    )
