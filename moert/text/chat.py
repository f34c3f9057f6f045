"""Conversations and chat templates. A template is a stranger's code: it runs in a sandbox, and not for long."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from moert.errors import TemplateError, UsageError

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str or parts of type text}

_MAX_STEPS = 1_000_000  # turns of loops and calls in one rendering; a template needs some for every message
_MAX_REPEAT = 10_000
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "self")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the first is the standard one


def as_messages(value: str | Message | Sequence[Message]) -> list[dict[str, Any]]:
    """Check a conversation and return its messages; a string is one user message, a mapping a conversation of one.

    Fields that are None count as absent, and reasoning gets the names that templates know it by, as in transformers.
    Raises UsageError that names the message and what was expected.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise UsageError(f"A conversation is a string or a list of messages, not {type(value).__name__}.")
    if not value:
        raise UsageError("The conversation is empty; give at least one message.")
    return [_as_message(message, f"Message {number}") for number, message in enumerate(value, 1)]


def _as_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} is of type {type(message).__name__}, but must be a mapping with role and content.")
    result = {str(key): _plain(item, where) for key, item in message.items() if item is not None}
    if not isinstance(result.get("role"), str) or not result["role"]:
        raise UsageError(f"{where} has no role; give it one such as user or assistant.")
    content = result.get("content")
    if content is None and not any(result.get(name) for name in ("tool_calls", *_REASONING)):
        raise UsageError(f"{where} has no content; it must be text or a list of parts of type text.")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise UsageError(f"{where} has a part of type {kind}, but only parts of type text can be used.")
            if not isinstance(part.get("text"), str):
                raise UsageError(f"{where} has a part of type text without a string as its text.")
    elif content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise UsageError(f"{where} has a content of type {kind}, but it must be text or a list of parts of type text.")
    if reasoning := next((result[name] for name in _REASONING if name in result), None):
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def _plain(value: Any, where: str) -> Any:
    """Copy data as JSON has them; a template is shown nothing else, since methods of objects may do anything."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str(value)
        case Mapping():
            return {str(key): _plain(item, where) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, where) for item in value]
    raise UsageError(f"{where} holds a {type(value).__name__}, but a template can only be given data as in JSON.")


def render(
    messages: str | Message | Sequence[Message],
    template: str | None,
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> str:
    """Render the prompt of a conversation; without a template contents follow one another, user turns on new lines.

    special_tokens: by the names that templates know them by. template_args: more variables, such as `enable_thinking`.
    Encode the result of a template without special tokens: the template writes them. Raises TemplateError, and
    UsageError for messages and arguments that no template could take.

    Contents in parts are given to the template as they are, as transformers does. Many templates only know strings:
    where that fails, loses a part or writes the list itself, each list becomes one string.
    """
    checked = as_messages(messages)
    arguments = check_template_args(template_args)
    if template is None:
        if arguments:
            raise UsageError("The model has no chat template, so template arguments have no effect: leave them out.")
        return _concatenate(_joined(checked))
    arguments = {
        "tools": None,
        "documents": None,
        **(special_tokens or {}),
        **arguments,
        "add_generation_prompt": add_generation_prompt,
    }
    lists = [message["content"] for message in checked if isinstance(message.get("content"), list)]
    if lists:
        try:
            text = _render(template, checked, arguments)
        except TemplateError:
            return _render(template, _joined(checked), arguments)
        written = any(form in text for content in lists for form in (str(content), json.dumps(content)) if content)
        kept = all(part["text"].strip() in text for content in lists for part in content)
        return text if kept and not written else _render(template, _joined(checked), arguments)
    return _render(template, checked, arguments)


def check_template(template: str) -> None:
    """Raise TemplateError where a template cannot be compiled."""
    with _explained():
        _compile(template)


def _render(template: str, messages: list[dict[str, Any]], arguments: Mapping[str, Any]) -> str:
    try:
        with _explained():
            environment, compiled = _compile(template)
            environment.steps = 0
            return compiled.render(messages=messages, **arguments)
    except TemplateError as error:
        empty = next((number for number, message in enumerate(messages, 1) if "content" not in message), None)
        if empty is None:
            raise
        why = f"message {empty} has no content, which this template may need"
        raise TemplateError(f"{str(error).rstrip('.')} ({why}).") from None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever a template raises into a TemplateError."""
    try:
        yield
    except jinja2.exceptions.SecurityError as error:
        raise TemplateError(f"The model's chat template does what a template may not: {_sentence(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        where = f"in line {error.lineno}: {_sentence(error)}"
        raise TemplateError(f"The model's chat template has a syntax error {where}") from None
    except RecursionError:
        raise TemplateError("The model's chat template calls itself without end.") from None
    except Exception as error:  # whatever a template's expressions raise
        raise TemplateError(f"The model's chat template failed: {_sentence(error)}") from None


def check_template_args(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of what is to be given to a template; UsageError names what cannot be."""
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UsageError("Template arguments must be a mapping from names to values.")
    for name in arguments:
        if not name.isidentifier():
            raise UsageError(f"Template argument {name!r} is not a name that a template can use.")
        if name in _RESERVED:
            raise UsageError(f"Template argument {name} is set by moert itself: choose another name.")
    return {name: _plain(value, f"Template argument {name}") for name, value in arguments.items()}


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with contents in parts as one string each."""
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _concatenate(messages: Sequence[Message]) -> str:
    text = ""
    for number, message in enumerate(messages, 1):
        if "content" not in message:
            raise UsageError(f"Message {number} has no content, and the model has no chat template for anything else.")
        if text and not text.endswith("\n") and message["role"] == "user":
            text += "\n"
        text += message["content"] + ("\n\n" if message["role"] == "system" else "")
    return text


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=lineno)]  # what it sets ends with it, as in transformers


class _Namespace(jinja2.utils.Namespace):
    """A namespace() that takes no names of Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that `self` may be a name in it
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"it sets {name!r} in a namespace.")
        super().__setitem__(name, value)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox keeps templates from Python's internals; the steps counted here keep them from running on."""

    intercepted_binops = frozenset({"*", "**"})
    steps = 0

    def count(self) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise jinja2.exceptions.SecurityError(f"it runs for more than {_MAX_STEPS:,} steps.")

    def bounded(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.count()
            yield item

    def call(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.count()
        return super().call(*args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}.")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [n for n in (left, right) if isinstance(n, (int, float))]
        if (operator == "**" or len(numbers) < 2) and any(abs(n) > _MAX_REPEAT for n in numbers):
            raise jinja2.exceptions.SecurityError(f"it computes something too large with {operator}.")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=4)
def _compile(source: str) -> tuple[_Environment, jinja2.Template]:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.filters["_bounded"] = environment.bounded
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    tree = environment.parse(source)
    for loop in tree.find_all(jinja2.nodes.For):
        loop.iter = jinja2.nodes.Filter(loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno)
    return environment, jinja2.Template.from_code(environment, environment.compile(tree), dict(environment.globals))


@dataclass
class Conversation:
    """The turns of a chat. A turn is a user's message and the answer to it."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return what the model is given: the system prompt, if any, and all turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> str | None:
        """Remove the last question, with its answer if there is one, and return it; None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()
