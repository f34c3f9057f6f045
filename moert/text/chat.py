"""Conversations and chat templates. A template is a stranger's code: it runs in a sandbox, and not for long."""

from __future__ import annotations

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

from moert.errors import TemplateError

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}

_MAX_STEPS = 1_000_000  # turns of loops and calls in one rendering; a template needs some for every message
_MAX_REPEAT = 10_000


def render(
    messages: Sequence[Message],
    template: str | None,
    *,
    add_generation_prompt: bool = True,
    bos: str | None = None,
    eos: str | None = None,
) -> str:
    """The prompt for `messages`. Without a template the contents follow one another, each user turn on a new line.

    Encode the result of a template without special tokens: the template writes them. Raises TemplateError.
    """
    if template is None:
        return _concatenate(messages)
    try:
        environment, compiled = _compile(template)
        environment.steps = 0
        return compiled.render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos or "",
            eos_token=eos or "",
            tools=None,
            documents=None,
        )
    except jinja2.exceptions.SecurityError as error:
        raise TemplateError(f"The model's chat template does what a template may not: {_sentence(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        where = f"in line {error.lineno}: {_sentence(error)}"
        raise TemplateError(f"The model's chat template has a syntax error {where}") from None
    except RecursionError:
        raise TemplateError("The model's chat template calls itself without end.") from None
    except Exception as error:  # whatever a template's expressions raise
        raise TemplateError(f"The model's chat template failed: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _concatenate(messages: Sequence[Message]) -> str:
    text = ""
    for message in messages:
        if text and not text.endswith("\n") and message["role"] == "user":
            text += "\n"
        text += message["content"] + ("\n\n" if message["role"] == "system" else "")
    return text


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body: list[jinja2.nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


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

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.filters["_bounded"] = environment.bounded
    functions: dict[str, Callable[..., Any]] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
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
        """What the model is given: the system prompt, if any, and all turns."""
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
