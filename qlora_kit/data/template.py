"""The chat template of a run: one text, settled before training and saved with the tokenizer.

Everything that `data.chat_template` and `data.system_prompt` ask for is written into the template itself, so
training, evaluation, generation and exported bundles render alike without knowing the recipe.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_kit.data.examples import Message, RowError
from qlora_kit.data.system_prompt import insert_system_prompt, suppress_default_prompt
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSection

_PROBE: list[Message] = [{"role": "user", "content": "Qprobe"}, {"role": "assistant", "content": "Aprobe"}]


def shipped_templates() -> dict[str, Path]:
    """Name to path of the templates that come with the package."""
    folder = Path(str(resources.files("qlora_kit") / "data" / "templates"))
    return {path.stem: path for path in sorted(folder.glob("*.jinja"))}


def resolve_template(tokenizer: Any, section: DataSection) -> str | None:
    """The jinja text to set as `tokenizer.chat_template` before anything is encoded.

    Starts from `data.chat_template`, or from the tokenizer's own. A template from outside the tokenizer gets
    `{{ bos_token }}` in front where the tokenizer begins plain text with one and the template does not.
    `data.system_prompt` is then written in: a text is put before conversations without a system turn, and ""
    takes out the prompt a template inserts by default (see `suppress_default_prompt`). Applying it to a
    tokenizer whose template is already resolved changes nothing.

    Returns:
        None for a tokenizer without a template where the recipe names none: prompt and completion are then
        joined as they are, and conversations are refused.

    Raises:
        DataError: no such template, broken jinja, a template that drops turns or writes nothing after the
            assistant's (a model could not learn to stop), or a system prompt that it cannot express.
    """
    if section.chat_template is not None:
        text = _with_bos(tokenizer, _read(section.chat_template))
        origin = f"data.chat_template {section.chat_template}"
    elif tokenizer.chat_template:
        text, origin = tokenizer.get_chat_template(), "the tokenizer's chat template"
    elif section.system_prompt:
        raise DataError("data.system_prompt needs a chat template, and this tokenizer has none", fix=no_template_fix())
    else:
        return None
    _check(tokenizer, text, origin)
    if section.system_prompt is None:
        return text
    render = partial(_try_render, tokenizer)
    if section.system_prompt == "":
        return suppress_default_prompt(text, render, tokenizer.bos_token or "")
    return insert_system_prompt(text, section.system_prompt, render)


def no_template_fix() -> str:
    """What to do where a conversation meets a tokenizer without a template."""
    return f"Set data.chat_template to one of {', '.join(shipped_templates())}, or to a .jinja file"


def render_chat(
    tokenizer: Any, messages: list[Message], tools: tuple[dict[str, Any], ...] = (), generation_prompt: bool = False
) -> str:
    """The text of a conversation in the tokenizer's template; `generation_prompt` opens the assistant's next turn.

    Raises:
        RowError: the template refuses these turns; its own message is passed on.
        DataError: the tokenizer has no template.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise DataError("this tokenizer has no chat template, and the data is a conversation", fix=no_template_fix())
    try:
        return tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise RowError(
            f"the chat template refuses these turns: {error}",
            reason="template refuses",
            fix="Change the row, or use a template that takes it (data.chat_template: chatml)",
        ) from None


def end_of_turn(tokenizer: Any) -> str:
    """What the template writes after an assistant turn's content, without the line break at its end."""
    return render_chat(tokenizer, _PROBE).rpartition(_PROBE[1]["content"])[2].rstrip()


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an assistant turn: the template's end-of-turn token (where it is one token) and eos.

    Generation stops at any of them. The template must be set on the tokenizer.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        tail_ids = tokenizer(end_of_turn(tokenizer).strip(), add_special_tokens=False)["input_ids"]
        if tail_ids and (len(tail_ids) == 1 or tail_ids[0] in tokenizer.added_tokens_decoder):
            ids.insert(0, tail_ids[0])
    return list(dict.fromkeys(ids))


def adds_bos(tokenizer: Any) -> bool:
    """True where the tokenizer begins plain text with its beginning-of-sequence token by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def _read(name: str) -> str:
    shipped = shipped_templates()
    path = shipped.get(name, Path(name))
    if path.suffix != ".jinja" or not path.is_file():
        raise DataError(f"no chat template {name}", allowed=f"{', '.join(shipped)}, or a .jinja file")
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", fix="Convert the file to UTF-8") from None


def _with_bos(tokenizer: Any, text: str) -> str:
    if not adds_bos(tokenizer):
        return text
    rendered = _try_render(tokenizer, text, _PROBE[:1])
    if rendered is None or rendered.startswith(tokenizer.bos_token):
        return text
    return "{{- bos_token -}}" + text


def _try_render(tokenizer: Any, template: str, messages: list[Message]) -> str | None:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError:
        raise
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        return None


def _check(tokenizer: Any, text: str, origin: str) -> None:
    import jinja2

    try:
        rendered = _try_render(tokenizer, text, _PROBE)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"{origin}: broken jinja in line {error.lineno}: {error.message}", fix="Mend that line"
        ) from None
    question, answer = (message["content"] for message in _PROBE)
    if rendered is None or question not in rendered or answer not in rendered:
        raise DataError(
            f"{origin} does not write a user turn and an assistant turn",
            got=rendered,
            fix="Loop over `messages` and write role and content of each",
        )
    if not rendered.rpartition(answer)[2].strip():
        raise DataError(
            f"{origin} writes nothing after an assistant turn, so a model could not learn to stop",
            got=rendered,
            fix="Write {{ eos_token }} after the assistant's content, or use data.chat_template: chatml",
        )
