"""The tokens that carry loss, against expectations written by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qlora_kit.data.examples import Conversation, PlainText, PromptCompletion, RowError
from qlora_kit.data.masking import IGNORED, encode, encode_whole, span_mask
from qlora_kit.data.template import shipped_templates

WORDS = ["fox", "dog", "🙂", "Köln", "naïve\n\n", "", "three", "12+5=17", "<tool_call>", "東京", ".", "!", "\t", "x"]


def turns(*pairs: Any) -> Any:
    return Conversation(tuple({"role": role, "content": content} for role, content in pairs))


def runs(row: Any, tokenizer: Any) -> Any:
    """Texts of the runs of tokens that carry loss."""
    found: list[str] = []
    current: list[int] = []
    for token, label in zip(row.input_ids.tolist(), [*row.labels.tolist()]):
        if label != IGNORED:
            assert label == token
            current.append(token)
        elif current:
            found, current = [*found, tokenizer.decode(current)], []
    return [*found, tokenizer.decode(current)] if current else found


def whole(row: Any, tokenizer: Any) -> Any:
    return tokenizer.decode(row.input_ids.tolist())


def test_one_turn_with_the_default_system_prompt_masked(smol: Any, section: Any) -> None:
    row = encode(turns(("user", "Hi fox"), ("assistant", "Hello dog")), smol, section())
    assert whole(row, smol) == (
        "<|im_start|>system\nYou are a helpful AI assistant named Smol<|im_end|>\n"
        "<|im_start|>user\nHi fox<|im_end|>\n<|im_start|>assistant\nHello dog<|im_end|>\n"
    )
    assert runs(row, smol) == ["Hello dog<|im_end|>"]
    assert row.labels[-1] == IGNORED  # the line break after the end of turn
    assert row.input_ids.dtype == row.labels.dtype == np.int32


def test_end_of_turn_is_learned_though_it_is_the_pad_token(smol: Any, section: Any) -> None:
    assert smol.pad_token_id == smol.eos_token_id
    row = encode(turns(("user", "a"), ("assistant", "b")), smol, section())
    assert (row.labels == smol.eos_token_id).sum() == 1
    assert (row.input_ids == smol.eos_token_id).sum() == 3


def test_every_assistant_turn_of_many(chatml: Any, section: Any) -> None:
    chat = turns(
        ("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"), ("user", "u3")
    )
    assert runs(encode(chat, chatml, section()), chatml) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_last_turn_only_for_scoring(chatml: Any) -> None:
    chat = turns(("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    assert runs(encode_whole(chat, chatml, "last_turn"), chatml) == ["a2<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "llama", "marked"])
def test_a_muted_turn_carries_no_loss(name: str, request: Any, section: Any) -> None:
    tokenizer = request.getfixturevalue(name)
    chat = turns(("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    heard = runs(encode(chat, tokenizer, section()), tokenizer)
    for k, turn in enumerate((1, 3)):
        muted = replace(chat, muted=(turn,))
        row = encode(muted, tokenizer, section())
        assert runs(row, tokenizer) == [heard[1 - k]] and row.silent_turns == 0
        everything = encode(muted, tokenizer, section(train_on="all"))
        assert not set(np.flatnonzero(everything.labels == IGNORED)[1:]) & set(np.flatnonzero(row.labels != IGNORED))
        assert (
            everything.loss_tokens
            == len(row.labels) - 1 - encode(replace(chat, muted=(4 - turn,)), tokenizer, section()).loss_tokens
        )
        assert runs(encode_whole(muted, tokenizer, "last_turn"), tokenizer) == [heard[1]]


def test_a_muted_turn_that_the_template_rewrites(reasoning: Any, marked: Any, section: Any) -> None:
    chat = turns(("user", "u1"), ("assistant", "<think>x</think>a1"), ("user", "u2"), ("assistant", "a2"))
    muted = replace(chat, muted=(1,))
    assert runs(encode(muted, reasoning, section()), reasoning) == ["a2<|im_end|>"]
    with pytest.raises(RowError, match="rewrites a turn with weight 0"):
        encode(muted, reasoning, section(train_on="all"))
    opened = "{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert opened in marked.chat_template
    marked.chat_template = marked.chat_template.replace(opened, "{{ 'otherwise' }}{% endif %}")
    assert runs(encode(muted, marked, section()), marked) == ["a2<|im_end|>"]
    closed = "{% generation %}{{ m.content }}{% endgeneration %}"
    marked.chat_template = marked.chat_template.replace(
        closed, "{% generation %}{{ m.content[:1] }}{% endgeneration %}-{% generation %}.{% endgeneration %}"
    )
    with pytest.raises(RowError, match="does not show where the turns with weight 0 stand"):
        encode(muted, marked, section())


def test_last_turn_of_a_template_with_several_marks_a_turn(marked: Any) -> None:
    closed = "{% generation %}{{ m.content }}{% endgeneration %}"
    twice = (
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}-{% generation %}{{ m.content[1:] }}{% endgeneration %}"
    )
    marked.chat_template = marked.chat_template.replace(closed, twice)
    chat = turns(("user", "u1"), ("assistant", "one"), ("user", "u2"), ("assistant", "two"))
    assert runs(encode_whole(chat, marked, "last_turn"), marked) == ["t", "wo<|im_end|>"]


def test_train_on_all_is_all_but_the_first(chatml: Any, section: Any) -> None:
    row = encode(turns(("user", "u"), ("assistant", "a")), chatml, section(train_on="all"))
    assert row.labels[0] == IGNORED and (row.labels[1:] == row.input_ids[1:]).all()


def test_llama_style_turns_and_one_bos_each(llama: Any, section: Any) -> None:
    chat = turns(("user", "fox"), ("assistant", "dog"), ("user", "three"), ("assistant", "apples"))
    row = encode(chat, llama, section())
    assert [text.strip() for text in runs(row, llama)] == ["dog </s>", "apples </s>"]
    assert (row.input_ids == llama.bos_token_id).sum() == 2
    assert row.input_ids[:2].tolist().count(llama.bos_token_id) == 1


def test_generation_marks_are_used_and_get_their_end_of_turn(marked: Any, section: Any) -> None:
    chat = turns(("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    assert runs(encode(chat, marked, section()), marked) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_generation_marks_rescue_a_template_without_the_prefix_property(marked: Any, section: Any) -> None:
    marked.chat_template = marked.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nNow: ")
    assert runs(encode(turns(("user", "u"), ("assistant", "a")), marked, section()), marked) == ["a<|im_end|>"]


def test_rewritten_earlier_turns_stay_silent_and_are_counted(reasoning: Any, section: Any) -> None:
    chat = turns(
        ("user", "u1"), ("assistant", "<think>x</think>a1"), ("user", "u2"), ("assistant", "<think>y</think>a2")
    )
    row = encode(chat, reasoning, section())
    assert runs(row, reasoning) == ["<think>y</think>a2<|im_end|>"]
    assert row.silent_turns == 1


def test_a_template_that_rewrites_the_last_turn_is_refused(chatml: Any, section: Any) -> None:
    chatml.chat_template = chatml.chat_template.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(RowError, match="otherwise than its generation prompt"):
        encode(turns(("user", "u"), ("assistant", "a")), chatml, section())


def test_tool_calls_carry_loss_and_tool_results_do_not(base: Any, section: Any) -> None:
    base.chat_template = shipped_templates()["chatml"].read_text()
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    chat = Conversation(
        (
            {"role": "user", "content": "u"},
            {"role": "assistant", "tool_calls": [call, call]},
            {"role": "tool", "content": "result 2"},
            {"role": "assistant", "content": "It is 2"},
        ),
        ({"type": "function", "function": {"name": "add", "parameters": {}}},),
    )
    row = encode(chat, base, section())
    one = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    assert runs(row, base) == [f"{one}\n{one}<|im_end|><|endoftext|>", "It is 2<|im_end|><|endoftext|>"]
    assert "<tools>\n" in whole(row, base) and "result 2" in whole(row, base)


def test_prompt_and_completion_without_a_template(base: Any, section: Any) -> None:
    row = encode(PromptCompletion("Question: three?", " Answer: dog"), base, section())
    assert whole(row, base) == "Question: three? Answer: dog<|endoftext|>"
    assert runs(row, base) == [" Answer: dog<|endoftext|>"]


def test_prompt_and_completion_with_a_template_are_turns(chatml: Any, section: Any) -> None:
    row = encode(PromptCompletion("fox", "dog"), chatml, section())
    assert runs(row, chatml) == ["dog<|im_end|>"] and "<|im_start|>user\nfox" in whole(row, chatml)


def test_plain_text_begins_with_one_bos_and_ends_with_eos(llama: Any, section: Any) -> None:
    for text in ("three apples", "<s>three apples"):
        row = encode(PlainText(text), llama, section())
        assert row.input_ids[0] == llama.bos_token_id and (row.input_ids == llama.bos_token_id).sum() == 1
        assert row.input_ids[-1] == llama.eos_token_id
        assert row.labels[0] == IGNORED and (row.labels[1:] != IGNORED).all()


def test_an_eos_the_text_brings_is_not_doubled(base: Any, section: Any) -> None:
    row = encode(PlainText("fox<|endoftext|>"), base, section())
    assert (row.input_ids == base.eos_token_id).sum() == 1


def test_a_character_of_many_tokens_carries_loss_whole(chatml: Any, section: Any) -> None:
    row = encode(turns(("user", "🙃"), ("assistant", "🙃")), chatml, section())
    assert runs(row, chatml) == ["🙃<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "smol", "marked", "reasoning", "llama"])
def test_any_conversation_trains_exactly_the_assistants_text(name: Any, request: Any, section: Any) -> None:
    tokenizer = request.getfixturevalue(name)
    end = " </s>" if name == "llama" else "<|im_end|>"
    chance = random.Random(7)
    for _ in range(60):
        pairs = [("system", "be kind")] if chance.random() < 0.5 else []
        said = []
        for _ in range(chance.randint(1, 5)):
            words = [" ".join(chance.choices(WORDS, k=chance.randint(1, 6))).strip() or "fox" for _ in range(2)]
            pairs += [("user", words[0]), ("assistant", words[1])]
            said.append(words[1] + end)
        row = encode(turns(*pairs), tokenizer, section(max_seq_len=4096))
        got = runs(row, tokenizer)
        if name == "llama":
            got = [text.strip() for text in got]
        assert got == said


def test_a_token_over_the_border_counts_for_the_answer() -> None:
    offsets = np.array([[0, 3], [3, 6], [6, 6], [6, 9], [9, 12]])
    assert span_mask(offsets, [(5, 9)]).tolist() == [False, True, True, True, False]
    assert span_mask(offsets, [(6, 9)]).tolist() == [False, False, True, True, False]


def test_an_eos_only_at_the_end_of_the_conversation(chatml: Any, section: Any) -> None:
    chatml.eos_token = "<|endoftext|>"
    chatml.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    chat = turns(("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    assert runs(encode(chat, chatml, section()), chatml) == ["a1<|im_end|>", "a2<|im_end|>\n<|endoftext|>"]


def test_a_mark_that_opens_before_the_generation_prompt_ends(marked: Any, section: Any) -> None:
    opened = "{% if m.role == 'assistant' %}{% generation %}{{ '\n' + m.content }}{% endgeneration %}"
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}" + opened + "{% else %}{{ '\n' + m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = turns(("user", "u"), ("assistant", "a"))
    assert runs(encode(chat, marked, section()), marked) == ["a<|im_end|>"]
