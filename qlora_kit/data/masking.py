"""Token ids and loss mask of an example: which tokens the model is trained to say.

A conversation is tokenized once, as a whole. Its assistant turns are found as character spans (`chat_spans`),
and offsets carry them over to tokens. The mask never looks at ids: a pad token that is also eos is told apart
by its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qlora_kit.data.chat_spans import Span, find_spans
from qlora_kit.data.examples import Conversation, Example, PlainText, PromptCompletion, RowError
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection

_ASSISTANT = "Set data.train_on: assistant"
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """A row as the model sees it.

    Attributes:
        input_ids: int32 [tokens].
        labels: int32 [tokens], not shifted; -100 where a token carries no loss. The first is always -100, as
            nothing predicts it. Tasks other than causal language modelling have labels of their own here.
        source: index into the report's sources; -1 where unknown.
        row: row number in that source.
        truncated: tokens were cut off its end.
        silent_turns: assistant turns that carry no loss, because the template writes them otherwise than
            generation would have (reasoning stripped from earlier turns).
        second: the token where the second of two texts starts; -1 where there is one.
        file: path of the image or sound that the row is, opened where a batch is made; empty where it is text.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: int = -1
    row: int = 0
    truncated: bool = False
    silent_turns: int = 0
    second: int = -1
    file: str = ""

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORED).sum())


def encode(example: Example, tokenizer: Any, section: DataSection) -> Encoded:
    """Ids and labels of an example, the tokenizer's chat template being the resolved one.

    Plain text carries loss on all tokens and ends with eos. So does a prompt with its completion where there
    is no template, on completion and eos; with a template it is a user turn and an assistant turn.

    Raises:
        RowError: too long (`data.overlong: error` or `skip`), no token carries loss, or the template
            refuses or drops a turn.
        DataError: the tokenizer is not a fast one, has no eos, or has no template for a conversation.
    """
    return _fitted(encode_whole(example, tokenizer, section.train_on), section)


def encode_whole(
    example: Example, tokenizer: Any, train_on: Literal["assistant", "all", "last_turn"] = "assistant"
) -> Encoded:
    """`encode` whatever the length; `last_turn` puts loss on the last assistant turn alone, muted or not.

    Raises:
        RowError, DataError: as `encode`, but for the length.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "this tokenizer has no character offsets, which the loss mask needs", fix="Use its fast version"
        )
    if isinstance(example, PromptCompletion) and tokenizer.chat_template:
        example = example.as_conversation()
    silent, muted = 0, list[Span]()
    if isinstance(example, Conversation):
        chat = find_spans(example, tokenizer)
        silent, muted = chat.silent_turns, [] if train_on == "last_turn" else chat.muted
        # The template has written bos itself where it is wanted.
        ids, offsets = _tokenize(tokenizer, chat.text, special=False)
        loss = span_mask(offsets, chat.spans[chat.last_turn :] if train_on == "last_turn" else chat.spans)
    else:
        ids, loss = _encode_plain(example, tokenizer)
    if train_on == "all":
        if isinstance(example, Conversation) and len(muted) < len(example.muted):
            raise RowError("the chat template rewrites a turn with weight 0", reason="no loss mask", fix=_ASSISTANT)
        loss = np.ones_like(loss)
    if muted:
        loss &= ~span_mask(offsets, muted)
    loss[0] = False
    return Encoded(ids, np.where(loss, ids, np.int32(IGNORED)), silent_turns=silent)


def span_mask(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """bool [tokens]: tokens of which at least one character lies in a span.

    Args:
        offsets: int [tokens, 2], characters [start, end) of each token; empty ones count where they stand.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=bool)
    for left, right in spans:
        mask |= (start < right) & ((end > left) | ((start == end) & (start >= left)))
    return mask


def _encode_plain(example: PlainText | PromptCompletion, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if tokenizer.eos_token_id is None:
        raise DataError("this tokenizer has no eos token, so a model could not learn to stop", fix="Set its eos_token")
    prompt = "" if isinstance(example, PlainText) else example.prompt
    text = example.text if isinstance(example, PlainText) else prompt + example.completion
    ids, offsets = _tokenize(tokenizer, text, special=plain_special(tokenizer, text))
    loss = span_mask(offsets, [(len(prompt), len(text))])
    if ids[-1] == tokenizer.eos_token_id:
        loss[-1] = True
        return ids, loss
    return np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(loss, True)


def plain_special(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer may add its own tokens to plain text: not where the text brings its bos along."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _tokenize(tokenizer: Any, text: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    if not out["input_ids"]:
        raise RowError("the row has no token", reason="no token")
    return np.array(out["input_ids"], dtype=np.int32), np.array(out["offset_mapping"], dtype=np.int64)


def _fitted(row: Encoded, section: DataSection) -> Encoded:
    length, limit = len(row.input_ids), section.max_seq_len
    if length > limit and section.overlong != "truncate":
        raise RowError(
            f"{length} tokens, more than data.max_seq_len {limit}",
            reason="overlong",
            fix="Raise data.max_seq_len, or set data.overlong to skip or truncate",
        )
    if length > limit:
        row = replace(row, input_ids=row.input_ids[:limit].copy(), labels=row.labels[:limit].copy(), truncated=True)
    if row.loss_tokens == 0:
        cut = f" within data.max_seq_len {limit}" if row.truncated else ""
        fix = "Raise data.max_seq_len, or set data.bad_rows: skip"
        raise RowError(f"no token carries loss{cut}", reason="all masked", fix=fix)
    return row
