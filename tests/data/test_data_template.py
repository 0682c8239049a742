"""The one template text of a run: chosen, completed, with its system prompt written in or taken out."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import Conversation
from qlora_kit.data.masking import encode
from qlora_kit.data.template import adds_bos, end_of_turn, resolve_template, shipped_templates, stop_token_ids
from qlora_kit.errors import DataError

USER = [{"role": "user", "content": "fox"}]
TOLD = [{"role": "system", "content": "told"}, *USER]
CHAT = [*USER, {"role": "assistant", "content": "dog"}]
QWEN = (  # shaped like Qwen2.5's: the default prompt stands in two places
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- else %}{{- 'You are \\'Q\\'.' }}{%- endif %}{{- '\\n# Tools' }}{% for t in tools %}{{ t.function.name }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{%- else %}{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>system\\nYou are \\'Q\\'.<|im_end|>\\n' }}{%- endif %}{%- endif %}"
    "{%- for m in messages if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MISTRAL = (  # the default is a variable: an empty system turn is the nearest to none
    "{%- set default = 'You are a default.' %}{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = default %}{%- set turns = messages %}{%- endif %}"
    "{{- '[SYS]' + system + '[/SYS]' }}"
    "{%- for m in turns %}{% if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{- m.content + eos_token }}{% endif %}{%- endfor %}"
)
COMPUTED = (  # no literal holds the default: only an empty system turn helps
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- else %}"
    "{%- set system = 'You are ' ~ 'computed.' %}{%- endif %}{{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}"
    "{%- for m in messages if m.role != 'system' %}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- endfor %}"
)
STUBBORN = (
    "{%- set told = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{- (told if told else 'I ' ~ 'stay.') ~ '\n' }}{%- for m in messages if m.role != 'system' %}"
    "{{- m.role ~ ': ' ~ m.content ~ eos_token ~ '\n' }}{%- endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def render(tokenizer: Any, section: Any, messages: Any, **options: Any) -> Any:
    tokenizer.chat_template = resolve_template(tokenizer, section)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_the_tokenizers_own_is_left_as_it_is(smol: Any, section: Any) -> None:
    assert resolve_template(smol, section()) == smol.chat_template


def test_a_base_model_has_none(base: Any, section: Any) -> None:
    assert resolve_template(base, section()) is None
    assert resolve_template(base, section(system_prompt="")) is None


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_shipped_templates_train_the_answer_and_its_eos(name: Any, base: Any, section: Any) -> None:
    base.chat_template = resolve_template(base, section(chat_template=name))
    row = encode(Conversation(tuple([*CHAT, *CHAT])), base, section())
    loss = base.decode(row.labels[row.labels != -100].tolist())
    end = end_of_turn(base)
    assert loss == f"dog{end}dog{end}" and end.endswith("<|endoftext|>")
    assert base.eos_token_id in stop_token_ids(base)
    assert "told" in base.apply_chat_template([TOLD[0], *CHAT], tokenize=False)


def test_a_jinja_file(base: Any, section: Any, tmp_path: Any) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role ~ ' says ' ~ m.content ~ eos_token }}{% endfor %}\n")
    assert render(base, section(chat_template=str(path)), USER) == "user says fox<|endoftext|>"


def test_bos_is_written_where_the_tokenizer_would_add_it(llama: Any, smol: Any, section: Any, tmp_path: Any) -> None:
    assert adds_bos(llama) and not adds_bos(smol)
    text = render(llama, section(chat_template="zephyr"), USER)
    assert text.startswith("<s><|user|>\nfox") and text.count("<s>") == 1
    path = tmp_path / "own.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}")
    assert render(llama, section(chat_template=str(path)), USER) == "<s>fox</s>"
    assert render(smol, section(chat_template="chatml"), USER).startswith("<|im_start|>user")


def test_none_keeps_the_default_prompt(smol: Any, section: Any) -> None:
    assert "named Smol" in render(smol, section(), USER)


def test_an_empty_prompt_takes_the_default_out(smol: Any, section: Any) -> None:
    told_before = smol.apply_chat_template(TOLD, tokenize=False)
    assert render(smol, section(system_prompt=""), USER) == "<|im_start|>user\nfox<|im_end|>\n"
    assert smol.apply_chat_template(TOLD, tokenize=False) == told_before
    assert resolve_template(smol, section(system_prompt="")) == smol.chat_template  # nothing more to take out


def test_an_empty_prompt_takes_it_out_everywhere(chatml: Any, section: Any) -> None:
    chatml.chat_template = QWEN
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert render(chatml, section(system_prompt=""), USER) == "<|im_start|>user\nfox<|im_end|>\n"
    with_tools = chatml.apply_chat_template(USER, tools=tools, tokenize=False)
    assert with_tools.startswith("<|im_start|>system\n\n# Toolsadd<|im_end|>")


def test_an_empty_prompt_becomes_an_empty_turn_where_nothing_else_works(chatml: Any, section: Any) -> None:
    chatml.chat_template = MISTRAL
    assert render(chatml, section(system_prompt=""), USER) == "[SYS][/SYS][INST]fox[/INST]"
    chatml.chat_template = COMPUTED
    expected = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nfox<|im_end|>\n"
    assert render(chatml, section(system_prompt=""), USER) == expected


def test_an_empty_prompt_with_bos_before_the_turns(llama: Any, section: Any) -> None:
    llama.chat_template = "{{- bos_token }}" + QWEN.replace("<|im_end|>", "</s>")
    assert render(llama, section(system_prompt=""), USER) == "<s><|im_start|>user\nfox</s>\n"


def test_alpacas_preamble_can_go(base: Any, section: Any) -> None:
    assert render(base, section(chat_template="alpaca"), USER).startswith("Below is an instruction")
    base.chat_template = None
    assert render(base, section(chat_template="alpaca", system_prompt=""), USER) == "### Instruction:\nfox\n\n"


@pytest.mark.parametrize("template", [GEMMA, QWEN.replace("You are \\'Q\\'.", "")])
def test_an_empty_prompt_changes_nothing_where_there_is_no_default(template: Any, chatml: Any, section: Any) -> None:
    chatml.chat_template = template
    assert resolve_template(chatml, section(system_prompt="")) == template


PROMPT = "Say \"yes\" or 'no' \\ {{ 1 }} %}\nüber 🙂"


def test_a_prompt_is_put_before_rows_without_one(smol: Any, section: Any) -> None:
    text = render(smol, section(system_prompt=PROMPT), USER)
    assert text == f"<|im_start|>system\n{PROMPT}<|im_end|>\n<|im_start|>user\nfox<|im_end|>\n"
    assert PROMPT not in smol.apply_chat_template(TOLD, tokenize=False)
    again = render(smol, section(system_prompt=PROMPT), USER)
    assert again == text


def test_a_prompt_survives_saving_the_tokenizer(smol: Any, section: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    text = render(smol, section(system_prompt=PROMPT), USER)
    smol.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(USER, tokenize=False) == text


@pytest.mark.parametrize("prompt", [None, "", PROMPT])
@pytest.mark.parametrize("template", ["chatml", "zephyr", "alpaca", QWEN, MISTRAL, COMPUTED])
def test_the_torch_free_runner_renders_alike(template: Any, prompt: Any, llama: Any, section: Any) -> None:
    chat = pytest.importorskip("qlora_runtime.chat")
    name = template if template in shipped_templates() else None
    llama.chat_template = None if name else template
    ours = resolve_template(llama, section(chat_template=name, system_prompt=prompt))
    theirs = chat.ChatTemplate(ours, llama.special_tokens_map)
    llama.chat_template = ours
    for messages in (USER, TOLD, [*CHAT, *USER]):
        text = llama.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert theirs.render(messages) == text


def test_a_row_masks_the_written_prompt(smol: Any, section: Any) -> None:
    fields = section(system_prompt="Say yes")
    smol.chat_template = resolve_template(smol, fields)
    row = encode(Conversation(tuple(CHAT)), smol, fields)
    assert smol.decode(row.labels[row.labels != -100].tolist()) == "dog<|im_end|>"


def test_stop_tokens(smol: Any, chatml: Any, llama: Any, base: Any) -> None:
    assert stop_token_ids(smol) == [smol.eos_token_id]
    chatml.eos_token = "<|endoftext|>"
    assert stop_token_ids(chatml) == [chatml.convert_tokens_to_ids("<|im_end|>"), chatml.eos_token_id]
    assert stop_token_ids(llama) == [llama.eos_token_id]
    assert stop_token_ids(base) == [base.eos_token_id]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", r"broken jinja in line 1"),
        ("hello", "does not write a user turn and an assistant turn"),
        ("{{ raise_exception('never') }}", "does not write a user turn"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "writes nothing after an assistant turn"),
    ],
)
def test_bad_templates(template: Any, message: Any, base: Any, section: Any, tmp_path: Any) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(template)
    with pytest.raises(DataError, match=message):
        resolve_template(base, section(chat_template=str(path)))


def test_unknown_template_name(base: Any, section: Any) -> None:
    with pytest.raises(
        DataError, match=r"no chat template chatlm\. Allowed: alpaca, chatml, zephyr, or a \.jinja file"
    ):
        resolve_template(base, section(chat_template="chatlm"))


def test_template_not_utf8(base: Any, section: Any, tmp_path: Any) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        resolve_template(base, section(chat_template=str(path)))


def test_system_prompt_without_a_template(base: Any, section: Any) -> None:
    with pytest.raises(DataError, match=r"system_prompt needs a chat template.*data\.chat_template"):
        resolve_template(base, section(system_prompt="be kind"))


def test_system_prompt_that_the_template_refuses(chatml: Any, section: Any) -> None:
    chatml.chat_template = GEMMA
    with pytest.raises(DataError, match="takes no system turn"):
        resolve_template(chatml, section(system_prompt="be kind"))


def test_default_prompt_that_cannot_go(chatml: Any, section: Any) -> None:
    chatml.chat_template = STUBBORN
    with pytest.raises(DataError, match="cannot suppress the default prompt"):
        resolve_template(chatml, section(system_prompt=""))
