"""Chat rows: OpenAI's `messages` and ShareGPT's `conversations`, checked and brought to one form.

The form is the one chat templates expect: tool-call arguments as objects (not JSON text), tools wrapped as
`{"type": "function", "function": {...}}`, content as plain text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from qlora_kit.data.examples import Conversation, Message, RowError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
_KEPT_KEYS = ("tool_call_id", "name", "reasoning_content", "thinking", "reasoning")


def messages_row(row: dict[str, Any]) -> Conversation:
    """A row in OpenAI's form: `messages`, and `tools` where there are any; `weight: 0` mutes an assistant turn.

    Raises:
        RowError: names the message and field.
    """
    turns = _turn_list(row, "messages")
    messages = [_openai_message(turn, f"messages[{k}]") for k, turn in enumerate(turns)]
    chat = _checked(messages, _tools(row), "messages")
    weights = [_weight(turn.get("weight"), f"messages[{k}].weight") for k, turn in enumerate(turns)]
    spoken = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    muted = tuple(k for k in spoken if weights[k] == 0)
    if len(muted) == len(spoken):
        problem = "every assistant turn of messages has weight 0"
        raise RowError(problem, reason="all masked", fix="Such a row teaches nothing")
    return replace(chat, muted=muted)


def sharegpt_row(row: dict[str, Any]) -> Conversation:
    """A row in ShareGPT's form: `conversations` of {from, value}; `tools` as JSON text; `system` beside it.

    Raises:
        RowError: names the turn and field.
    """
    turns = _turn_list(row, "conversations")
    messages = [_sharegpt_message(turn, f"conversations[{k}]") for k, turn in enumerate(turns)]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return _checked(messages, _tools(row), "conversations")


def _turn_list(row: dict[str, Any], column: str) -> list[Any]:
    turns = row[column]
    if isinstance(turns, str):  # a CSV cell can only hold the list as JSON text
        turns = _json(turns, column)
    if not isinstance(turns, list):
        raise RowError(f"{column} is {type(turns).__name__}, not a list", reason="no list of turns")
    if not turns:
        raise RowError(f"{column} is empty", reason="no turns")
    return turns


def _openai_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{place} is {type(turn).__name__}, not an object", reason="broken turn")
    role = turn.get("role")
    if role not in ROLES:
        raise RowError(f"{place}.role is unknown", reason="unknown role", got=role, allowed=", ".join(ROLES))
    message: Message = {"role": role}
    content = _content(turn.get("content"), f"{place}.content")
    if content is not None:
        message["content"] = content
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], f"{place}.tool_calls")
    message.update({key: turn[key] for key in _KEPT_KEYS if turn.get(key) is not None})
    return message


def _weight(weight: Any, place: str) -> int:
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{place} is neither 0 nor 1", reason="unknown weight", got=weight, allowed="0, 1")
    return int(weight)


def _content(content: Any, place: str) -> str | None:
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if any(kind != "text" or not isinstance(part.get("text"), str) for kind, part in zip(kinds, content)):
            raise RowError(f"{place} has parts that are no text", reason="content not text", got=kinds)
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise RowError(f"{place} is {type(content).__name__}, not text", reason="content not text")
    return content


def _sharegpt_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RowError(f"{place} is no {{from, value}}", reason="broken turn", got=turn)
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(
            f"{place}.from is unknown", reason="unknown role", got=turn["from"], allowed=", ".join(SHAREGPT_ROLES)
        )
    if role == "function_call":
        calls = _json(turn["value"], f"{place}.value") if isinstance(turn["value"], str) else turn["value"]
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": _tool_calls(calls, f"{place}.value")}
    content = _content(turn["value"], f"{place}.value")
    return {"role": role, "content": content or ""}


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RowError(f"{place} is {type(calls).__name__}, not a list", reason="broken tool call")
    return [_tool_call(call, f"{place}[{k}]") for k, call in enumerate(calls)]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError(f"{place} names no function", reason="broken tool call", got=call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"{place}.arguments is no object", reason="broken tool call", got=arguments)
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else []
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is no list of objects", reason="broken tools", got=tools)
    wrapped = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)
    for k, tool in enumerate(wrapped):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError(f"tools[{k}] has no name", reason="broken tools", got=tool)
    return wrapped


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{place} is not valid JSON: {error}", reason="broken JSON", got=text[:80]) from None


def _checked(messages: list[Message], tools: tuple[dict[str, Any], ...], column: str) -> Conversation:
    before = ""
    for k, message in enumerate(messages):
        role, place = message["role"], f"{column}[{k}]"
        if role == "system" and k > 0:
            second = messages[0]["role"] == "system"
            what = "a second system turn" if second else "a system turn after others"
            raise RowError(f"{place}: {what}", reason="wrong role order", fix="Keep one, as the first turn")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"{place}: tool result without a call before it", reason="wrong role order")
        if role == "assistant" and "user" not in [turn["role"] for turn in messages[:k]]:
            raise RowError(f"{place}: assistant turn before any user turn", reason="wrong role order")
        _check_filled(message, place)
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise RowError(f"{column} has no assistant turn", reason="no assistant turn", fix="Such a row teaches nothing")
    return Conversation(tuple(messages), tools)


def _check_filled(message: Message, place: str) -> None:
    filled = bool((message.get("content") or "").strip())
    if message["role"] == "assistant" and not filled and not message.get("tool_calls"):
        raise RowError(f"{place}: assistant turn with empty content", reason="empty completion")
    if message["role"] == "user" and not filled:
        raise RowError(f"{place}: user turn with empty content", reason="empty prompt")
    if message["role"] in ("system", "tool") and "content" not in message:
        raise RowError(f"{place}: {message['role']} turn without content", reason="content missing")
