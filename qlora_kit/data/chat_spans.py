"""Where the assistant speaks in a rendered conversation, as character spans.

A turn begins where generation would begin (the turns before it, rendered with the generation prompt) and ends
with the template's end-of-turn text, without the line break after it. A template that marks the assistant's
text with `{% generation %}` is believed, within these limits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.examples import Conversation, Message, RowError
from qlora_kit.data.template import end_of_turn, render_chat

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True)
class ChatText:
    """A conversation as the template writes it.

    Attributes:
        text: all of it.
        spans: characters [start, end) that carry loss, in order.
        last_turn: index of the first span that belongs to the last assistant turn.
        silent_turns: assistant turns that the template keeps from carrying loss.
        muted: those of the spans whose turns are not to be learned.
    """

    text: str
    spans: list[Span]
    last_turn: int
    silent_turns: int
    muted: list[Span]

    def last_said(self) -> str:
        """The text of the last assistant turn, with its end of turn."""
        return self.text[self.spans[self.last_turn][0] : self.spans[-1][1]]


def find_spans(conversation: Conversation, tokenizer: Any) -> ChatText:
    """Renders a conversation and finds its assistant turns.

    Raises:
        RowError: the template refuses or drops a turn, or no assistant turn can be told from the rest.
    """
    messages, tools = list(conversation.messages), conversation.tools
    text = render_chat(tokenizer, messages, tools)
    before, own = "", dict[int, Span]()
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k in turns:
        before = render_chat(tokenizer, messages[:k], tools, generation_prompt=True)
        whole = text if k == len(messages) - 1 else render_chat(tokenizer, messages[: k + 1], tools)
        end = _turn_end(whole, text, tokenizer.eos_token or "")
        if whole.startswith(before) and end > len(before):
            own[k] = (len(before), end)
            _check_calls_written(messages[k], text[len(before) : end], k)
    spans, silent = list(own.values()), len(turns) - len(own)
    if _GENERATION_TAG.search(tokenizer.get_chat_template(tools=list(tools) or None)):
        marked = _marked_spans(conversation, tokenizer, text)
        closing = end_of_turn(tokenizer)
        nexts = [start for start, _ in marked[1:]] + [len(text)]
        spans = [_fitted_mark(mark, after, spans, text, closing) for mark, after in zip(marked, nexts)]
        silent = max(0, len(turns) - len(marked))
    if not spans:
        raise RowError(
            "the chat template writes the assistant's turns otherwise than its generation prompt opens them",
            reason="no loss mask",
            fix="Use a template whose text only grows with each turn (data.chat_template: chatml)",
        )
    _check_nothing_dropped(conversation, text)
    last_turn = next((k for k, span in enumerate(spans) if span[1] > len(before)), len(spans) - 1)
    return ChatText(text, spans, last_turn, silent, _muted_spans(conversation.muted, turns, own, spans))


def _muted_spans(muted: tuple[int, ...], turns: list[int], own: dict[int, Span], spans: list[Span]) -> list[Span]:
    """Those of `spans` that belong to `muted` turns; `own` is where turns stand by the generation prompt."""
    if spans == list(own.values()) or all(k in own for k in muted):
        areas = [own[k] for k in muted if k in own]
        return [span for span in spans if any(span[0] < right and left < span[1] for left, right in areas)]
    if len(spans) == len(turns):  # one mark a turn
        return [spans[turns.index(k)] for k in muted]
    raise RowError(
        "the chat template does not show where the turns with weight 0 stand",
        reason="no loss mask",
        fix="Use a template whose text only grows with each turn (data.chat_template: chatml)",
    )


def _marked_spans(conversation: Conversation, tokenizer: Any, text: str) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools: Any = list(conversation.tools) or None
    result: Any = render_jinja_template(
        conversations=[list(conversation.messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    rendered, marks = result
    if rendered[0] != text:
        raise RowError("the chat template's {% generation %} marks change its text", reason="no loss mask")
    trimmed = [(start, start + len(text[start:end].rstrip())) for start, end in marks[0]]
    return [(start, end) for start, end in trimmed if end > start]


def _turn_end(whole: str, text: str, eos: str) -> int:
    """Where a turn ends in `text`, given the conversation up to it as rendered alone; -1 if it reads otherwise."""
    trimmed = whole.rstrip()
    # Phi-3's template closes a conversation, but not a turn inside of one, with eos.
    inner = trimmed.removesuffix(eos).rstrip() if eos else trimmed
    return next((len(part) for part in (trimmed, inner) if text.startswith(part)), -1)


def _fitted_mark(mark: Span, after: int, spans: list[Span], text: str, closing: str) -> Span:
    # A template may open its mark before the generation prompt ends, and close it before the end-of-turn token:
    # the one is given when generating, the other must be learned.
    begin = max((start for start, _ in spans if mark[0] < start < mark[1]), default=mark[0])
    ends = [end for start, end in spans if start <= begin < end and mark[1] < end <= after]
    if not ends and text.startswith(closing, mark[1]):
        ends = [mark[1] + len(closing)]
    return begin, max(ends, default=mark[1])


def _check_nothing_dropped(conversation: Conversation, text: str) -> None:
    for k, message in enumerate(conversation.messages):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise RowError(
                f"the chat template drops or rewrites the {message['role']} turn (turn {k})",
                reason="template drops a turn",
                fix="Use a template that writes it (data.chat_template: chatml)",
            )
    _require_names([tool["function"]["name"] for tool in conversation.tools], text, "the row's tools")


def _check_calls_written(message: Message, piece: str, turn: int) -> None:
    # Looked for in the turn alone: a list of tools elsewhere in the text names the same functions.
    _require_names([call["function"]["name"] for call in message.get("tool_calls", [])], piece, f"turn {turn}'s calls")


def _require_names(names: list[str], text: str, what: str) -> None:
    dropped = sorted({name for name in names if name not in text})
    if dropped:
        raise RowError(
            f"the chat template does not write {what}: {', '.join(dropped)}",
            reason="template drops tools",
            fix="Use a template that does (data.chat_template: chatml), or remove them",
        )
