"""Examples that cannot be encoded: too long, or changed by the template on the way."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, PlainText, RowError
from qlora_kit.data.masking import encode
from qlora_kit.errors import DataError


def turns(*pairs: Any) -> Conversation:
    return Conversation(tuple({"role": role, "content": content} for role, content in pairs))


def test_overlong_rows(chatml: Any, section: Any) -> None:
    chat = turns(("user", "fox"), ("assistant", "dog " * 50))
    for choice in ("skip", "error"):
        with pytest.raises(RowError, match=r"tokens, more than data\.max_seq_len 24.*overlong"):
            encode(chat, chatml, section(max_seq_len=24, overlong=choice))
    row = encode(chat, chatml, section(max_seq_len=24, overlong="truncate"))
    assert len(row.input_ids) == 24 and row.truncated and row.loss_tokens > 0


def test_a_cut_row_without_loss_is_bad(chatml: Any, section: Any) -> None:
    chat = turns(("user", "fox " * 50), ("assistant", "dog"))
    with pytest.raises(RowError, match=r"no token carries loss within data\.max_seq_len 16"):
        encode(chat, chatml, section(max_seq_len=16, overlong="truncate"))


def test_a_conversation_needs_a_template(base: Any, section: Any) -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template to one of alpaca, chatml, zephyr"):
        encode(turns(("user", "u"), ("assistant", "a")), base, section())


def test_the_templates_own_refusal_is_passed_on(llama: Any, section: Any) -> None:
    with pytest.raises(RowError, match="roles must alternate"):
        encode(turns(("user", "u"), ("user", "u"), ("assistant", "a")), llama, section())


def test_a_template_that_drops_the_system_turn_is_refused(chatml: Any, section: Any) -> None:
    chatml.chat_template = chatml.chat_template.replace("messages %}", "messages if m.role != 'system' %}", 1)
    with pytest.raises(RowError, match=r"drops or rewrites the system turn \(turn 0\)"):
        encode(turns(("system", "be kind"), ("user", "u"), ("assistant", "a")), chatml, section())


def test_a_template_without_tools_is_refused(chatml: Any, section: Any) -> None:
    chat = Conversation(
        ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}), ({"function": {"name": "add"}},)
    )
    with pytest.raises(RowError, match="does not write the row's tools: add"):
        encode(chat, chatml, section())


def test_a_template_that_lists_tools_but_drops_calls_is_refused(chatml: Any, section: Any) -> None:
    chatml.chat_template = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + chatml.chat_template.replace(
        "m.content", "(m.content or '')"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    chat = Conversation(
        ({"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}),
        ({"function": {"name": "add"}},),
    )
    with pytest.raises(RowError, match="does not write turn 1's calls: add"):
        encode(chat, chatml, section())


def test_no_eos_token_is_an_error(base: Any, section: Any) -> None:
    base.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        encode(PlainText("fox"), base, section())


def test_slow_tokenizers_are_refused(section: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="no character offsets"):
        encode(PlainText("fox"), Slow(), section())
