"""A chat as the user sees it: turns, answers that can be stopped, commands. Does not know where lines come from."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from moert.cli.common import SAMPLING, conclude, write_text
from moert.cli.status import Status
from moert.config import did_you_mean, format_bytes
from moert.errors import MoertError, UsageError
from moert.text.chat import Conversation

if TYPE_CHECKING:
    from moert.api import LLM, GenerationStats
    from moert.engine.sampling import ResolvedParams

SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    **{name: (name, kind) for _, name, kind, _ in SAMPLING},
    "max_tokens": ("max_tokens", int),
}
HELP = '''/help                list the commands
/clear               forget the conversation
/regen               answer the last question again
/system TEXT         set the system prompt (alone: show it)
/set NAME VALUE      change temp, top_k, top_p, min_p, repeat_penalty, seed, max_tokens (alone: list them)
/stats               show figures of the last answer
/exit /quit /bye     quit, as Ctrl-D does
"""                  begins and ends a text of several lines
Ctrl-C               stops an answer'''


class Interrupt:
    """While an answer is made, the first Ctrl-C asks it to stop after the current token; a second one breaks in.

    Before the first token (`armed` is False) it breaks in at once: a long prompt would keep the user waiting.
    """

    armed = False
    asked = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.armed or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._previous)


class ChatSession:
    """One conversation with `llm`. `interactive`: a person is there, so errors are shown and the chat goes on."""

    def __init__(
        self,
        llm: LLM,
        params: ResolvedParams,
        system: str | None,
        status: Status,
        interactive: bool,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.llm, self.params, self.status, self.interactive = llm, params, status, interactive
        self.template_args = template_args
        self.conversation = Conversation(system)
        self.last: GenerationStats | None = None
        self._attempt = 0  # of the same question: a fixed seed must not give the same answer again

    def handle(self, text: str, verbatim: bool = False) -> bool:
        """Take what the user entered; `verbatim` text is never a command. Returns False when the user leaves."""
        words = text.split(maxsplit=1)
        if not words:
            return True
        name = words[0][1:]
        command = getattr(self, f"_do_{name}", None) if words[0].startswith("/") and not verbatim else None
        if command is not None:
            return command(words[1].strip() if len(words) > 1 else "") is not False
        if self.interactive and words[0].startswith("/") and not verbatim:
            names = [n.removeprefix("_do_") for n in dir(self) if n.startswith("_do_")]
            near = did_you_mean(f"/{name}", (f"/{n}" for n in names), "; see /help.")
            self.status.show(f"There is no command /{name}{near}")
            return True
        self._attempt = 0
        self._turn(text, list(self.conversation.turns))
        return True

    def _turn(self, question: str, before: list[dict[str, str]]) -> None:
        """Answer `question`. If nothing comes of it, the conversation goes back to `before`: nothing said is lost."""
        self.conversation.ask(question)
        answer: list[str] = []
        finish: str | None = None
        try:
            finish = self._answer(answer)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            finish = "stopped"
        except MoertError as error:
            if not self.interactive:
                raise
            self.status.show(f"moert: {error}", style="red")
            if isinstance(error, UsageError):
                self.status.show("The conversation is as it was before; /clear empties the context.")
        finally:
            text = "".join(answer)
            if text:
                self.conversation.answer(text)
                print(end="" if text.endswith("\n") else "\n", flush=True)
            else:
                self.conversation.turns = before
        self._conclude(text, finish)

    def _answer(self, answer: list[str]) -> str | None:
        """Print an answer as it is made and collect it in `answer`; returns why it ended."""
        seed = self.params.seed
        params = self.params if seed is None else self.params.replace(seed=(seed + self._attempt) % 2**63)
        with Interrupt() if self.interactive else contextlib.nullcontext(Interrupt()) as interrupt:
            pieces = self.llm.stream_chat(self.conversation.messages, params, template_args=self.template_args)
            with self.status.spinner("Thinking"):
                piece = next(pieces, None)
            finish = None
            while piece is not None:
                write_text(piece.text)
                answer.append(piece.text)
                self.last, finish = piece.stats, piece.finish_reason
                if interrupt.asked:
                    return "stopped"
                interrupt.armed = True
                piece = next(pieces, None)
        return finish

    def _conclude(self, text: str, finish: str | None) -> None:
        if finish == "stopped":
            self.status.show("(stopped)")
        elif finish == "stop" and not text:
            self.status.show("(the model ended its answer before it began; the conversation is as it was before)")
        if not text or self.last is None:
            return
        conclude(self.llm, self.last, self.status)
        if finish == "length" and self.last.completion_tokens < self.params.max_tokens:
            self.status.show(
                f"The context of {self.llm.ctx_size} tokens is full: /clear empties it, --ctx-size makes it larger."
            )
        elif finish == "length":
            self.status.say(f"(cut at max_tokens {self.params.max_tokens})")

    # Commands: _do_NAME(rest of the line); False leaves.

    def _do_help(self, rest: str) -> None:
        self.status.show(HELP)

    def _do_exit(self, rest: str) -> bool:
        return False

    _do_quit = _do_bye = _do_exit

    def _do_clear(self, rest: str) -> None:
        self.conversation.clear()
        self.status.show("The conversation is empty.")

    def _do_regen(self, rest: str) -> None:
        before = list(self.conversation.turns)
        question = self.conversation.take_back()
        if question is None:
            self.status.show("There is nothing to answer again.")
            return
        self._attempt += 1
        self._turn(question, before)

    def _do_system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
        self.status.show(f"System prompt: {self.conversation.system or '(none)'}")

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        known = {n: SETTINGS[n] for n in ([name] if name else SETTINGS) if n in SETTINGS}
        try:
            if not known:
                raise UsageError(f"There is no setting {name!r}{did_you_mean(name, SETTINGS, '; /set lists them.')}")
            field, kind = SETTINGS[name] if name else ("", str)
            if value:
                self.params = self.params.replace(**{field: _parse(name, kind, value.strip())})
        except UsageError as error:
            self.status.show(str(error))
            return
        for field in dict.fromkeys(field for field, _ in known.values()):
            current = getattr(self.params, field)
            self.status.show(f"{field} {'random' if current is None else current}")

    def _do_stats(self, rest: str) -> None:
        if self.last is None:
            self.status.show("There is no answer yet.")
            return
        for name, value in self.last.as_dict().items():
            if isinstance(value, dict):
                shown = ", ".join(f"{width} bits {share:.1%}" for width, share in value.items())
            else:
                shown = (
                    format_bytes(value) if "bytes" in name else f"{value:.3g}" if isinstance(value, float) else value
                )
            self.status.show(f"{name:36}{shown}")
        for line in self.llm.plan.compare() if self.llm.plan is not None else ():
            self.status.show(f"plan, {line}")


def _parse(name: str, kind: Callable[[str], Any], value: str) -> Any:
    if name == "seed" and value in ("random", "none"):
        return None
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} cannot be {value!r}: it is a number.") from None
