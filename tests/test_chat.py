"""Chat templates against transformers' rendering, and templates that must not be obeyed."""

from __future__ import annotations

import datetime

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from moert.errors import TemplateError, UsageError
from moert.text.chat import Conversation, as_messages, check_template, render

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{%- set ns = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for message in loop_messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}{%- continue -%}{%- endif -%}
    {%- set content = ('<<SYS>>\n' ~ ns.system ~ '\n<</SYS>>\n\n' ~ message.content) if loop.first and ns.system
        else message.content -%}
    {%- if message.role == 'user' -%}[INST] {{ content.strip() }} [/INST]
    {%- else -%}{% generation %} {{ content }} {{ eos_token }}{% endgeneration %}{%- endif -%}
{%- endfor -%}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{{ message['content'] + eos_token}}{% endif %}{% if loop.last and tools is not none %}{{ tools | tojson }}{% endif %}
{% endfor %}"""
JSON = """{{ {'a': messages[0].content, 'n': 1} | tojson }}
{{ messages | map(attribute='role') | list | tojson(indent=2) }}
{{ strftime_now('%Y') }}{% for x in [1, 2, 3] %}{{ loop.length }}{{ loop.revindex }}{% endfor %}
{% macro twice(t) %}{{ t * 2 }}{% endmacro %}{{ twice('é<') }}"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": " What's <b>1+1</b> & 'é'? "}
BOT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", [CHATML, LLAMA, JSON])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, BOT, USER], [SYSTEM, USER, BOT, USER]])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(
    reference: PreTrainedTokenizerFast, template: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    mine = render(messages, template, add_generation_prompt=prompt, special_tokens=SPECIAL)
    assert mine == expected


PARTS = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"""
TOOLS = """{% for m in messages %}{{ m.role }}:{% if m.content is defined %}{{ m.content }}{% endif %}
{% for call in m.tool_calls or [] %}{{ call.function | tojson(separators=(',', ':'), sort_keys=true) }}{% endfor %}
{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"""
SETTINGS = """{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{{ note }}{{ numbers | tojson }}{{ pad_token }}{{ eos_token }}{% set ns = namespace(n=0) %}
{% generation %}{% set note = 'inner' %}
{% set ns.n = 5 %}{{ note }}{% endgeneration %}{{ note }}{{ ns.n }}{{ dict(a=1).a }}{{ messages[0].content }}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}
{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"""
TWO_PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
CALL = {
    "role": "assistant",
    "content": None,
    "reasoning": "hm",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}],
}


@pytest.mark.parametrize(
    ("messages", "template"), [([TWO_PARTS, BOT], PARTS), ([USER, CALL], TOOLS), ([{**CALL, "content": ""}], TOOLS)]
)
def test_parts_and_tool_calls_equal_transformers(
    reference: PreTrainedTokenizerFast, messages: list[dict[str, object]], template: str
) -> None:
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert render(messages, template, add_generation_prompt=False, special_tokens=SPECIAL) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"enable_thinking": False},
        {"enable_thinking": True, "note": "é<", "numbers": [1, {"a": None}]},
        {"eos_token": "X"},
    ],
)
def test_template_arguments_equal_transformers(
    reference: PreTrainedTokenizerFast, arguments: dict[str, object]
) -> None:
    arguments = {"numbers": [], **arguments}
    expected = reference.apply_chat_template([USER], chat_template=SETTINGS, tokenize=False, **arguments)
    mine = render([USER], SETTINGS, add_generation_prompt=False, special_tokens=SPECIAL, template_args=arguments)
    assert mine == expected


@pytest.mark.parametrize("template", [CHATML, "{{ messages[0].content }}", "{{ messages[0].content | tojson }}", None])
def test_parts_become_a_string_for_a_template_that_knows_only_strings(template: str | None) -> None:
    assert render([TWO_PARTS], template) == render("onetwo", template)


def test_shapes_of_a_conversation() -> None:
    assert as_messages("hi") == [{"role": "user", "content": "hi"}]
    assert as_messages(BOT) == as_messages([BOT]) == as_messages((BOT,)) == [BOT]
    assert render("hi", CHATML) == render({"role": "user", "content": "hi"}, CHATML)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "a string or a list of messages, not int"),
        (b"hi", "not bytes"),
        ([], "conversation is empty"),
        (["hi"], "Message 1 is of type str"),
        ([USER, {"content": "x"}], "Message 2 has no role"),
        ([{"role": 5, "content": "x"}], "Message 1 has no role"),
        ([{"role": "assistant", "content": None}], "Message 1 has no content"),
        ([{"role": "user"}], "Message 1 has no content"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part of type image"),
        ([{"role": "user", "content": ["x"]}], "part of type str"),
        ([{"role": "user", "content": [{"type": "text"}]}], "without a string as its text"),
        ([{"role": "user", "content": object()}], "holds a object, but a template"),
    ],
)
def test_a_conversation_of_another_shape_is_one_sentence(value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        as_messages(value)  # type: ignore[arg-type]
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "messages is set by moert"),
        ({"add_generation_prompt": False}, "add_generation_prompt is set by moert"),
        ({"a b": 1}, "not a name"),
        ({"f": print}, "f holds a builtin_function_or_method"),
        ([1], "must be a mapping"),
    ],
)
def test_template_arguments_that_cannot_be(arguments: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render([USER], CHATML, template_args=arguments)  # type: ignore[arg-type]


def test_what_needs_a_template_says_so() -> None:
    with pytest.raises(UsageError, match="no chat template, so template arguments"):
        render([USER], None, template_args={"enable_thinking": False})
    with pytest.raises(UsageError, match="Message 1 has no content, and the model has no chat template"):
        render([CALL], None)
    with pytest.raises(TemplateError, match=r"failed: .* \(message 1 has no content, which this template may need\)\."):
        render([CALL], "{{ 'x' + messages[0].content }}")


def test_a_template_is_checked_without_messages() -> None:
    check_template("{{ messages[7].content }}")
    with pytest.raises(TemplateError, match="syntax error in line 1"):
        check_template("{% for m in messages %}")


def test_a_template_that_refuses_system_prompts(reference: PreTrainedTokenizerFast) -> None:
    turns = [USER, BOT, USER]
    expected = reference.apply_chat_template(turns, chat_template=MISTRAL, tokenize=False)
    assert render(turns, MISTRAL, special_tokens=SPECIAL) == expected
    with pytest.raises(TemplateError, match="failed: Conversation roles must alternate"):
        render([SYSTEM, USER], MISTRAL, special_tokens=SPECIAL)


def test_the_year_is_now() -> None:
    assert render([USER], "{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ self.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ messages | tojson(cls=dict) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_leaving_the_sandbox_is_refused(template: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render([USER], template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "syntax error in line 1"),
        ("a\n{{ b", "syntax error in line 2"),
        ("{{ nothing.at.all }}", "failed: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{% include 'x' %}", "failed"),
        ("{% for i in range(10000000000) %}{% endfor %}", "Range too big"),
        ("{% set r = range(90000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "more than 1,000,000"),
        ("{% for i in 'a' * 10 ** 10 %}{% endfor %}", "too large"),
        ("{{ 10 ** 10 ** 10 }}", "too large"),
        ("{{ [0] * 100000000 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "more than 1,000,000",
        ),
    ],
)
def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        render([USER], template)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_steps_are_counted_per_rendering() -> None:
    template = "{% for i in range(60000) %}{% endfor %}"
    for _ in range(20):
        assert render([USER], template) == ""


def test_without_a_template_contents_follow_one_another() -> None:
    turns = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "\nimport sys"}]
    assert render(turns[:1], None) == "import os"
    assert render([*turns, {"role": "user", "content": "x"}], None) == "import os\nimport sys\nx"
    assert render([SYSTEM, turns[0]], None) == "Be brief.\n\nimport os"


def test_conversation() -> None:
    chat = Conversation("sys")
    assert chat.take_back() is None
    chat.ask("one")
    chat.answer("1")
    chat.ask("two")
    assert [m["content"] for m in chat.messages] == ["sys", "one", "1", "two"]
    assert chat.take_back() == "two"
    assert chat.take_back() == "one"
    assert chat.turns == []
    chat.ask("three")
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "sys"}]
    assert Conversation("").messages == []
