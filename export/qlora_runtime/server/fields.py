"""Requests of OpenAI's chat completions and completions, read strictly.

Fields that change no answer are ignored; those of OpenAI's that would change it and are not built are refused
unless they ask for nothing; unknown ones are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_runtime.chat import Message
from qlora_runtime.errors import ArgumentError
from qlora_runtime.sampling import Sampling
from qlora_runtime.server.errors import bad
from qlora_runtime.strict_json import JsonObject

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOPS = 4  # as OpenAI has it

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_COMMON = {
    *("model", "stream", "stream_options", "stop", "max_tokens"),
    *_SAMPLING,
}
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
}
_NOTHING: dict[str, tuple[Any, ...]] = {  # field that is not built: values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    prompt: str | Sequence[Message]
    sampling: Sampling
    stream: bool
    include_usage: bool  # of a stream: its last event says how many tokens there were


def read_chat(body: JsonObject, limit: int) -> Asked:
    """A request of /v1/chat/completions; `limit`: the most tokens that an answer may have.

    Raises:
        ApiError: 400, the first field that is wrong.
    """
    _check_known(body, _COMMON | {"messages", "max_completion_tokens"})
    if _given(body, "max_completion_tokens"):
        body = body | {"max_tokens": body["max_completion_tokens"]}
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages: a list of at least one message is expected.", "messages")
    chat = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    return _asked(body, chat, limit)


def read_completion(body: JsonObject, limit: int) -> Asked:
    """A request of /v1/completions, of one prompt; as `read_chat`."""
    _check_known(body, _COMMON | {"prompt"})
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise bad("prompt: one text is expected; token ids and several prompts are not read.", "prompt")
    return _asked(body, prompt, limit)


def _asked(body: JsonObject, prompt: str | list[Message], limit: int) -> Asked:
    tokens = body["max_tokens"] if _given(body, "max_tokens") else limit
    if isinstance(tokens, int) and tokens > limit:
        raise bad(f"max_tokens is {tokens}, this server allows up to {limit}.", "max_tokens")
    stop = body["stop"] if _given(body, "stop") else []
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise bad(f"stop has {len(stops)} texts, at most {MAX_STOPS} are allowed.", "stop")
    given = {name: body[name] for name in _SAMPLING if _given(body, name)}
    try:
        sampling = Sampling(max_new_tokens=tokens, stop=stops, **given)
    except ArgumentError as error:
        raise bad(str(error)) from error
    stream = _flag(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream) or set(options) - {"include_usage"}:
        raise bad(
            'stream_options: {"include_usage": true or false} is expected, with stream: true.',
            "stream_options",
        )
    return Asked(prompt, sampling, stream, _flag(options, "include_usage"))


def _check_known(body: JsonObject, known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _NOTHING:
            raise bad(f"Unknown parameter: {name!r}.", name, "unknown_parameter")
        if value not in _NOTHING[name]:
            raise bad(f"{name} is not supported by this server. Leave it out.", name, "unsupported_parameter")


def _message(message: Any, where: str) -> Message:
    """{"role", "content"} with the content as one text: parts are joined by line ends."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise bad(f"{where}: an object with a role of {', '.join(ROLES)} is expected.", where)
    given = {name: value for name, value in message.items() if value is not None}
    if odd := sorted(set(given) - {"role", "content", "name"}):
        raise bad(f"{where}: {odd} are not supported. Leave them out.", where, "unsupported_parameter")
    return given | {"content": _content(given.get("content"), where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) and content else [None]
    texts = [part["text"] for part in parts if _is_text(part)]
    if len(texts) < len(parts):
        raise bad(f"{where}: content is expected to be a text, or a list of parts of type text.", where)
    return "\n".join(texts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _given(body: JsonObject, name: str) -> bool:
    return body.get(name) is not None


def _flag(body: JsonObject, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(f"{name} is {value!r}, true or false is expected.", name)
    return bool(value)
