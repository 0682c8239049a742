"""Writes a system prompt into a chat template, or takes a template's default one out of it.

Some templates speak on their own: SmolLM2's and Qwen2.5's put "You are a helpful ..." before a conversation
that has no system turn. A run that wants none of it must not merely leave it out of its own rows: whoever
uses the model later renders with the same template. So the template's text is changed, and each change is
proven by rendering before it is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from qlora_kit.data.examples import Message
from qlora_kit.errors import DataError

Render = Callable[[str, list[Message]], str | None]  # (template, messages) -> text, None where it refuses
_MARK, _ASK, _ANSWER, _AGAIN = "Smark", "Uprobe", "Aprobe", "Vprobe"
_USER: Message = {"role": "user", "content": _ASK}


def insert_system_prompt(template: str, prompt: str, render: Render) -> str:
    """A template that puts `prompt` before conversations whose first turn is not `system`.

    Raises:
        DataError: the template refuses or drops system turns.
    """
    changed = _prelude(prompt) + template
    rendered = render(changed, [_USER])
    if rendered is None or prompt.strip() not in rendered:
        raise DataError(
            "data.system_prompt: this chat template takes no system turn",
            got=prompt,
            fix="Put the text into the user turns, or use another data.chat_template",
        )
    return changed


def suppress_default_prompt(template: str, render: Render, bos: str = "") -> str:
    """A template that no longer inserts a prompt of its own; the same text where it inserts none.

    First the string literals that hold the default prompt are emptied. The result is accepted if a
    conversation with its own system turn renders as before, and one without begins as a later user turn
    does, or as it would with an empty system turn. Where no such edit exists, an empty system turn is put
    before conversations without one. What a template writes whatever the system turn says (a date, a list
    of tools) stays. `bos` is the text a template may write before everything.

    Raises:
        DataError: the default prompt cannot be taken out.
    """
    default = _default_prompt(template, render)
    if not default:
        return template
    for changed in _emptied(template, default):
        if _accepted(template, changed, default, render, bos):
            return changed
    changed = _prelude("") + template
    rendered = render(changed, [_USER])
    if rendered is not None and default not in rendered:
        return changed
    raise DataError(
        'data.system_prompt "" cannot suppress the default prompt of this chat template',
        got=default,
        fix="Give a data.system_prompt, or a data.chat_template without a default",
    )


def _prelude(prompt: str) -> str:
    # Set, not rendered: the template below sees the longer list as if the caller had passed it.
    literal = json.dumps(prompt, ensure_ascii=False)
    return (
        "{%- set messages = messages if messages and messages[0]['role'] == 'system'"
        f" else [{{'role': 'system', 'content': {literal}}}] + messages -%}}\n"
    )


def _default_prompt(template: str, render: Render) -> str:
    """What stands, without a system turn, where a system turn's content would stand; "" for nothing."""
    bare = render(template, [_USER])
    told = render(template, [{"role": "system", "content": _MARK}, _USER])
    if bare is None or told is None or _MARK not in told:
        return ""
    before, _, after = told.partition(_MARK)
    if len(bare) <= len(before) + len(after) or not (bare.startswith(before) and bare.endswith(after)):
        return ""
    return bare[len(before) : len(bare) - len(after)]


def _emptied(template: str, default: str) -> Iterator[str]:
    import jinja2

    core = default.strip()
    pieces = {}
    for _, kind, raw in jinja2.Environment(autoescape=True).lex(template):
        if kind == "string":
            decoded = raw[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            if core in decoded:
                pieces[raw] = raw[0] * 2
        elif kind == "data" and core in raw:
            pieces[raw] = ""
    if pieces:
        whole = template
        for raw, empty in pieces.items():
            whole = whole.replace(raw, empty)
        yield whole
    if core in template:
        yield template.replace(core, "")


def _accepted(template: str, changed: str, default: str, render: Render, bos: str) -> bool:
    told: list[Message] = [{"role": "system", "content": _MARK}, _USER]
    bare = render(changed, [_USER])
    if bare is None or default.strip() in bare or render(changed, told) != render(template, told):
        return False
    if bare == render(template, [{"role": "system", "content": ""}, _USER]):
        return True
    chat: list[Message] = [_USER, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
    longer = render(changed, chat) or ""
    between = longer.partition(_ANSWER)[2].partition(_AGAIN)[0]
    opening = bare.partition(_ASK)[0].removeprefix(bos)
    return opening != "" and between.endswith(opening)
