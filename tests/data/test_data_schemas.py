"""Rows of every schema become examples; rows that cannot say which field is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, PlainText, PromptCompletion, RowError, content_hash, split_key
from qlora_kit.data.schemas import RowParser
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSource

SOURCE = DataSource.model_validate({"path": "data.jsonl"})
USER = {"role": "user", "content": "u"}
SAID = {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.fixture
def parse(section: Any) -> Any:
    def first(row: Any, **fields: Any) -> Any:
        return RowParser(section(**fields), SOURCE).parse(1, row)

    return first


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "t", "id": 7}, PlainText("t")),
        ({"prompt": "p", "completion": "c"}, PromptCompletion("p", "c")),
        ({"question": "p", "answer": "c"}, PromptCompletion("p", "c")),
        ({"instruction": "p", "response": "c"}, PromptCompletion("p", "c")),
        ({"instruction": "u", "input": "", "output": "a"}, Conversation((USER, SAID))),
        ({"instruction": "u", "output": "a"}, Conversation((USER, SAID))),
        ({"instruction": "u", "input": None, "output": "a"}, Conversation((USER, SAID))),
        (
            {"instruction": "u", "input": "more", "output": "a", "system": "s"},
            Conversation(({"role": "system", "content": "s"}, {"role": "user", "content": "u\n\nmore"}, SAID)),
        ),
        ({"messages": [USER, SAID]}, Conversation((USER, SAID))),
        ({"messages": json.dumps([USER, SAID])}, Conversation((USER, SAID))),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, SAID]},
            Conversation((USER, SAID)),
        ),
        ({"conversations": [HUMAN, GPT]}, Conversation((USER, SAID))),
        (
            {"conversations": [HUMAN, GPT], "system": "s"},
            Conversation(({"role": "system", "content": "s"}, USER, SAID)),
        ),
    ],
)
def test_each_schema_is_detected(row: Any, example: Any, parse: Any) -> None:
    assert parse(row) == example


@pytest.mark.parametrize(
    ("weights", "muted"), [((0, 1), (1,)), ((1, 0.0), (3,)), ((None, None), ()), ((1, 1.0), ()), ((0, None), (1,))]
)
def test_openai_weights(weights: Any, muted: Any, parse: Any) -> None:
    said = [SAID if weight is None else {**SAID, "weight": weight} for weight in weights]
    row = {"messages": [{**USER, "weight": None}, said[0], USER, said[1]]}
    assert parse(row) == Conversation((USER, SAID, USER, SAID), muted=muted)


def test_openai_tools(parse: Any) -> None:
    openai_call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [openai_call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "tool_calls": None},
            SAID,
        ],
        "tools": [TOOL],
    }
    assert parse(row) == Conversation(
        (
            {"role": "system", "content": "s"},
            USER,
            {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            SAID,
        ),
        ({"type": "function", "function": TOOL},),
    )


def test_sharegpt_tools(parse: Any) -> None:
    call = json.dumps({"name": "add", "arguments": '{"x": 1}'})
    row = {
        "conversations": [HUMAN, {"from": "function_call", "value": call}, {"from": "observation", "value": "2"}, GPT],
        "tools": json.dumps([TOOL]),
    }
    expected = (USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, SAID)
    assert parse(row) == Conversation(expected, ({"type": "function", "function": TOOL},))


def test_columns_are_renamed(parse: Any) -> None:
    row = {"q": "p", "a": "c", "prompt": "other"}
    assert parse(row, columns={"prompt": "q", "completion": "a"}) == PromptCompletion("p", "c")


def test_a_named_schema_settles_what_is_ambiguous(parse: Any) -> None:
    row = {"text": "t", "prompt": "p", "completion": "c"}
    with pytest.raises(DataError, match=r"data\.jsonl row 1: columns fit several schemas: text, prompt_completion"):
        parse(row)
    assert parse(row, schema="text") == PlainText("t")


def test_unused_columns_are_named(section: Any) -> None:
    parser = RowParser(section(), SOURCE)
    parser.parse(1, {"text": "t", "label": 1, "id": 2})
    assert list(parser.ignored_columns) == ["label", "id"]


def test_hashes_know_content_and_prompt() -> None:
    pair, chat = PromptCompletion("p", "c"), PromptCompletion("p", "c").as_conversation()
    assert content_hash(pair) == content_hash(chat) != content_hash(PromptCompletion("p", "d"))
    assert split_key(pair, 1) == split_key(PromptCompletion("p", "d"), 1) != split_key(pair, 2)
    assert split_key(PlainText("a"), 1) != split_key(PlainText("b"), 1)


FIRST_ROWS = [
    (
        {"a": 1, "b": 2},
        {},
        r"row 1: no schema fits its columns \(got \['a', 'b'\]\).*prompt_completion \(prompt, completion\)",
    ),
    ({"question": "q", "answer": "a", "context": "c"}, {}, r"no schema fits.*data\.columns"),
    ({"chosen": [], "rejected": []}, {}, r"no schema fits"),
    ({"text": "t"}, {"schema": "messages"}, r"row 1: schema messages needs column 'messages' \(got \['text'\]\)"),
    ({"q": "p"}, {"columns": {"prompt": "question"}}, r"no column 'question', which data\.columns names for 'prompt'"),
    ({"q": "p"}, {"columns": {"prompt": "q"}, "schema": "prompt_completion"}, r"needs column 'completion'"),
]


@pytest.mark.parametrize(("row", "fields", "message"), FIRST_ROWS)
def test_first_rows_without_a_schema(row: Any, fields: Any, message: Any, parse: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse(row, **fields)
    assert not isinstance(caught.value, RowError)  # no skipping: every row of the file would fail


def test_mixed_schemas_stop_the_run(section: Any) -> None:
    parser = RowParser(section(bad_rows="skip"), SOURCE)
    parser.parse(1, {"text": "t"})
    with pytest.raises(
        DataError, match=r"data\.jsonl row 5: mixed schemas: this row is alpaca, the rows before are text"
    ) as e:
        parser.parse(5, {"instruction": "u", "output": "a"})
    assert not isinstance(e.value, RowError)


def test_a_later_row_without_a_column_can_be_skipped(section: Any) -> None:
    parser = RowParser(section(), SOURCE)
    parser.parse(1, {"prompt": "p", "completion": "c"})
    for row in ({"prompt": "p"}, {"prompt": "p", "completion": None}):
        with pytest.raises(RowError, match=r"schema prompt_completion needs column 'completion'.*data\.columns"):
            parser.parse(2, row)


def chat(*messages: Any, **more: Any) -> Any:
    return {"messages": list(messages)} | more


def with_call(call: Any) -> Any:
    return chat(USER, {"role": "assistant", "tool_calls": [call]})


WEIGHTS = (0.5, 2, -1, "0", True, [1])
ROWS = [
    ({"text": " \n"}, "text is empty"),
    ({"text": 5}, r"text is int, not text \(got 5\)"),
    ({"prompt": "", "completion": "c"}, "prompt is empty"),
    ({"prompt": "p", "completion": " "}, "completion is empty"),
    ({"prompt": "p", "completion": 1}, "completion is int, not text"),
    ({"instruction": "i", "output": ""}, "output is empty"),
    ({"instruction": " ", "input": "x", "output": "o"}, "instruction is empty"),
    ({"instruction": "i", "input": 3, "output": "o"}, "input is int, not text"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "[{"}, "messages is not valid JSON"),
    ({"messages": {"role": "user"}}, "messages is dict, not a list"),
    (chat("hello"), r"messages\[0\] is str, not an object"),
    (
        chat({"role": "developer", "content": "x"}),
        r"messages\[0\]\.role is unknown \(got 'developer'\)\. Allowed: system, user",
    ),
    (chat({"content": "x"}), r"messages\[0\]\.role is unknown \(got None\)"),
    (chat(USER), "messages has no assistant turn"),
    (chat(SAID, USER), r"messages\[0\]: assistant turn before any user turn"),
    (chat(USER, {"role": "assistant", "content": ""}), r"messages\[1\]: assistant turn with empty content"),
    (chat(USER, {"role": "assistant", "content": None}), r"messages\[1\]: assistant turn with empty content"),
    (chat({"role": "user", "content": " "}, SAID), r"messages\[0\]: user turn with empty content"),
    (chat({"role": "system"}, USER, SAID), r"messages\[0\]: system turn without content"),
    (chat(*[{"role": "system", "content": "s"}] * 2, USER, SAID), r"messages\[1\]: a second system turn"),
    (chat(USER, {"role": "system", "content": "s"}, SAID), r"messages\[1\]: a system turn after others"),
    (chat(USER, {"role": "tool", "content": "2"}, SAID), r"messages\[1\]: tool result without a call"),
    (chat({"role": "user", "content": 5}, SAID), r"messages\[0\]\.content is int, not text"),
    (
        chat({"role": "user", "content": [{"type": "image_url"}]}, SAID),
        r"parts that are no text \(got \['image_url'\]\)",
    ),
    *((chat(USER, {**SAID, "weight": weight}), r"messages\[1\]\.weight is neither 0 nor 1") for weight in WEIGHTS),
    (chat(USER, {**SAID, "weight": 0}), "every assistant turn of messages has weight 0"),
    (with_call({"function": {"arguments": "{}"}}), r"tool_calls\[0\] names no function"),
    (with_call("add"), r"tool_calls\[0\] names no function"),
    (with_call({"function": {"name": "add", "arguments": "{x"}}), r"tool_calls\[0\]\.arguments is not valid JSON"),
    (with_call({"function": {"name": "add", "arguments": "[1]"}}), r"tool_calls\[0\]\.arguments is no object"),
    (chat(USER, {"role": "assistant", "tool_calls": {"name": "add"}}), r"tool_calls is dict, not a list"),
    (chat(USER, SAID, tools="[{"), "tools is not valid JSON"),
    (chat(USER, SAID, tools=["add"]), "tools is no list of objects"),
    (chat(USER, SAID, tools=[{"description": "adds"}]), r"tools\[0\] has no name"),
    ({"conversations": [{"role": "user", "content": "u"}]}, r"conversations\[0\] is no \{from, value\}"),
    (
        {"conversations": [{"from": "narrator", "value": "u"}]},
        r"conversations\[0\]\.from is unknown \(got 'narrator'\)",
    ),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "add()"}]},
        r"conversations\[1\]\.value is not valid JSON",
    ),
    (
        {"conversations": [HUMAN, {"from": "gpt", "value": None}]},
        r"conversations\[1\]: assistant turn with empty content",
    ),
    ({"conversations": [HUMAN, {"from": "gpt", "value": 7}]}, r"conversations\[1\]\.value is int, not text"),
]


@pytest.mark.parametrize(("row", "message"), ROWS)
def test_rows_that_cannot_be_used(row: Any, message: Any, parse: Any) -> None:
    with pytest.raises(RowError, match=message):
        parse(row)
