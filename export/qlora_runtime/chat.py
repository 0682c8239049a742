"""Rendering messages with the model's chat template, as it was rendered in training.

Templates come with models and are not trusted: they run in jinja2's immutable sandbox and see only plain
JSON data.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qlora_runtime.errors import ArgumentError, ChatTemplateError
from qlora_runtime.strict_json import JsonObject

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}

# What a template may stumble over, besides its own errors, when messages are not shaped as it expects.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`. Raises ChatTemplateError where it is no valid template."""
        try:
            self._template: Template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template cannot be read: {error}. Export again.") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, ready to encode without special tokens.

        Args:
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions the model may call.
            variables: whatever else the template reads, such as {"enable_thinking": False}.

        Raises:
            ArgumentError: messages, tools or variables are not plain JSON data.
            ChatTemplateError: the template refuses the messages, or fails on them.
        """
        names = self._special_tokens | _plain("variables", dict(variables or {}))
        chat = [_with_reasoning(message) for message in _checked_messages(messages)]
        schemas = None if tools is None else _plain("tools", list(tools))
        given = {"messages": chat, "tools": schemas, "documents": None}
        try:
            return self._template.render(names | given | {"add_generation_prompt": add_generation_prompt})
        except _RENDER_ERRORS as error:
            raise ChatTemplateError(
                f"the chat template does not accept these messages: {error}. Their roles are "
                f"{[message['role'] for message in chat]}; see chat_template.jinja for what it accepts."
            ) from error


def load_chat_template(bundle_dir: Path, tokenizer_config: JsonObject) -> ChatTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json; None where there is neither.

    Raises:
        ChatTemplateError: the template cannot be read, or tokenizer_config.json has several.
    """
    file = bundle_dir / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ChatTemplateError(
            "tokenizer_config.json has several chat templates, one is allowed. Save the one the model was "
            "trained with as chat_template.jinja, and export again."
        )
    return ChatTemplate(source, _special_tokens(tokenizer_config))


def _special_tokens(tokenizer_config: JsonObject) -> dict[str, str]:
    """The special tokens by name; older files write a token as an object with its text under 'content'."""
    more = tokenizer_config.get("model_specific_special_tokens")
    named = {name: tokenizer_config.get(name) for name in _SPECIAL_TOKENS} | (
        more if isinstance(more, dict) else {}
    )
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    plain = _plain(
        "messages", [dict(message) if isinstance(message, Mapping) else message for message in messages]
    )
    for index, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ArgumentError(
                f"messages[{index}] is {message!r}, expected an object such as "
                '{"role": "user", "content": "..."}.'
            )
    return list(plain)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning goes by several names; templates find it under each."""
    found = [message[name] for name in _REASONING_NAMES if message.get(name) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _plain(what: str, value: Any) -> Any:
    """A copy of `value` made of JSON types alone: objects with methods have no place in a sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{what} must be plain JSON data (text, numbers, lists, objects): {error}."
        ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect chat templates are written in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _SafeNamespace,
    }
    environment.globals.update(functions)
    return environment


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's words for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own way to declare tags)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _SafeNamespace(Namespace):
    """jinja2's namespace, without names that could reach Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not set the attribute {name!r} of a namespace")
        super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models are trained on it: jinja2's own filter would escape < > & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
