"""Chat templates against transformers' rendering, and templates that must not be obeyed."""

from __future__ import annotations

import datetime

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from moert.chat import Conversation, render
from moert.errors import TemplateError

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
