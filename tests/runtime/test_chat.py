"""Chats are rendered as transformers renders them, in a sandbox."""

import pytest
from jinja2 import TemplateError
from qlora_runtime.chat import ChatTemplate, load_chat_template
from qlora_runtime.errors import ArgumentError, ChatTemplateError

from .tiny import CHAT_TEMPLATE

USER = {"role": "user", "content": 'What is <b> & "c"? 漢字'}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be kind."}, USER],
    [USER, {"role": "assistant", "content": "A letter."}, {"role": "user", "content": "  spaced \n"}],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 漢字", "parameters": {}}}]

# What templates use: whitespace control, loop control, macros, namespaces, special tokens, JSON of all kinds.
TEMPLATES = {
    "own": CHAT_TEMPLATE,
    "whitespace": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% endif %}\n"
        "{% endfor %}\nend\n"
    ),
    "special tokens": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
    "loop control": ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"),
    "generation": (
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}"
    ),
    "tojson": (
        "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}"
    ),
    "tools": "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ tools is none }}{{ documents }}",
    "variables": "{{ enable_thinking is defined and enable_thinking }}{{ dict(a=1, b=2) }}",
    "reasoning": (
        "{% for m in messages %}{{ m.reasoning_content | default('-') }}{{ m.thinking | default('-') }}{% endfor %}"
    ),
    "macro": (
        "{% macro line(m) %}{{ m.role | upper }}: {{ m.content | trim }}\n{% endmacro %}"
        "{% for m in messages %}{{ line(m) }}{% endfor %}"
    ),
}


def both(tiny, template: str, messages, **options) -> tuple[str, str]:
    """The same chat, rendered by us and by transformers."""
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    variables = {"enable_thinking": True}
    ours = ChatTemplate(template, special).render(messages, variables=variables, **options)
    theirs = tiny.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **variables, **options
    )
    return ours, theirs


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(tiny, name, messages, add_generation_prompt):
    ours, theirs = both(tiny, TEMPLATES[name], messages, add_generation_prompt=add_generation_prompt)
    assert ours == theirs


@pytest.mark.parametrize("name", ["own", "tools"])
def test_rendering_with_tools_equals_transformers(tiny, name):
    ours, theirs = both(tiny, TEMPLATES[name], CHATS[0], add_generation_prompt=True, tools=TOOLS)
    assert ours == theirs
    assert "a < b & 漢字" in ours


@pytest.mark.parametrize("field", ["thinking", "reasoning", "reasoning_content"])
def test_reasoning_is_found_under_each_of_its_names(tiny, field):
    messages = [USER, {"role": "assistant", "content": "4", field: "2 + 2"}]
    ours, theirs = both(tiny, TEMPLATES["reasoning"], messages, add_generation_prompt=False)
    assert ours == theirs == "--2 + 22 + 2"


def test_the_date_is_the_one_of_today(tiny):
    ours, theirs = both(tiny, "{{ strftime_now('%Y-%m') }}", CHATS[0], add_generation_prompt=False)
    assert ours == theirs


@pytest.mark.parametrize("messages", CHATS)
def test_the_bundles_own_chats_have_the_tokens_of_transformers(bundle, tiny, messages):
    theirs = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert bundle.encode_prompt(messages) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template):
    with pytest.raises(ChatTemplateError, match="does not accept these messages"):
        ChatTemplate(template, {}).render([USER])


def test_what_a_template_refuses_names_its_reason(bundle):
    with pytest.raises(ChatTemplateError, match="unknown role narrator") as caught:
        bundle.render_chat([{"role": "narrator", "content": "x"}])
    assert isinstance(caught.value.__cause__, TemplateError)


def test_messages_that_the_template_stumbles_over_are_an_error(bundle):
    with pytest.raises(ChatTemplateError, match="does not accept these messages"):
        bundle.render_chat([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hello"], r"messages\[0\] is 'hello'"),
        ([USER, {"content": "no role"}], r"messages\[1\]"),
        ([{"role": "user", "content": object()}], "messages must be plain JSON data"),
    ],
)
def test_messages_of_another_shape_are_refused(bundle, messages, message):
    with pytest.raises(ArgumentError, match=message):
        bundle.render_chat(messages)


def test_a_broken_template_is_an_error():
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        ChatTemplate("{% for %}", {})


def test_where_templates_are_found(tmp_path):
    assert load_chat_template(tmp_path, {}) is None
    old_style = {"chat_template": "old{{ bos_token }}", "bos_token": {"content": "<s>"}}
    template = load_chat_template(tmp_path, old_style)
    assert template is not None
    assert template.render([USER]) == "old<s>"
    (tmp_path / "chat_template.jinja").write_text("new")
    template = load_chat_template(tmp_path, old_style)
    assert template is not None
    assert template.render([USER]) == "new"


def test_several_templates_are_refused(tmp_path):
    with pytest.raises(ChatTemplateError, match="several chat templates"):
        load_chat_template(tmp_path, {"chat_template": [{"name": "default", "template": "x"}]})
