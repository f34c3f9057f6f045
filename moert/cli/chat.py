"""Talk with a model. /help lists the commands; without a terminal every line of stdin is answered."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moert.cli import common
from moert.cli.figures import add_options as add_figures_options
from moert.cli.figures import figures
from moert.cli.session import ChatSession
from moert.cli.status import Status
from moert.config import AUTO

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

_BLOCK = '"""'


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_run_options(parser, memory_budget=AUTO)
    common.add_template_options(parser)
    add_figures_options(parser)


def main(args: argparse.Namespace) -> int:
    status = Status.of(args)
    person = sys.stdin.isatty()
    template_args = common.template_args(args)
    with figures(args, status) as taken, common.open_llm(args, status) as llm:
        taken.of(llm)
        status.say(common.headline(args, llm) + (" · /help for commands, Ctrl-D to quit" if person else ""))
        params = common.sampling_params(args, llm, status)
        if llm.tokenizer.chat_template is None:
            status.warn("the model has no chat template, so it continues your text instead of answering it")
        session = ChatSession(llm, params, args.system, status, person, template_args)
        if person:
            interactive(session, make_prompt())
        else:
            piped(session)
    return 0


def make_prompt() -> PromptSession[str]:
    """A line editor with a history; drawn on stderr if stdout is not a terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.output import create_output

    path = history_file()
    history = InMemoryHistory() if path is None else FileHistory(str(path))
    if sys.stdout.isatty():
        return PromptSession(history=history, reserve_space_for_menu=0)
    return PromptSession(history=history, reserve_space_for_menu=0, output=create_output(sys.stderr))


def history_file() -> Path | None:
    """Return the file in which questions are kept, readable by the user alone; None where nothing can be written."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moert"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "history"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        return path
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def interactive(session: ChatSession, prompt: PromptSession[str]) -> None:
    """Until the user leaves: by a command, Ctrl-D, or Ctrl-C twice."""
    warned = False
    while True:
        try:
            entered = read_turn(prompt.prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            session.status.show("Ctrl-C again quits, as do Ctrl-D and /exit.")
            continue
        warned = False
        if not session.handle(*entered):
            return


def piped(session: ChatSession) -> None:
    """Answer every line of stdin."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to leave the other lines unanswered

    def read_line(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    while True:
        try:
            entered = read_turn(read_line)
        except EOFError:
            return
        if not session.handle(*entered):
            return


def read_turn(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """One line, or what stands between triple quotes; and whether it stood there. Raises EOFError at the end."""
    line = read_line("> ")
    if not line.lstrip().startswith(_BLOCK):
        return line, False
    text = line.lstrip().removeprefix(_BLOCK)
    while not text.rstrip().endswith(_BLOCK):
        try:
            text += "\n" + read_line(". ")
        except EOFError:
            return text.strip("\n"), True
    return text.rstrip().removesuffix(_BLOCK).strip("\n"), True
