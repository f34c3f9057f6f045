"""The chat as a user meets it: with and without a terminal, interrupted, out of context, and its commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from moert.cli import chat
from moert.cli.session import ChatSession
from moert.cli.status import Status
from moert.errors import StoreError, UsageError

from .program import FakeLLM, Program


@pytest.fixture
def moert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return Program(capsys, monkeypatch, tmp_path)


# chat without a terminal


def test_chat_answers_every_line_of_stdin(moert: Program) -> None:
    llm = FakeLLM(["A1"], ["A2\n"], ["A3"])
    result = moert("chat", "-sys", "S", stdin='one\n\n  two\n"""three\n\nfour"""\n', llm=llm)
    assert (result.code, result.out) == (0, "A1\nA2\nA3\n")
    assert llm.asked == [
        ["S", "one"],
        ["S", "one", "A1", "  two"],
        ["S", "one", "A1", "  two", "A2\n", "three\n\nfour"],
    ]
    assert result.err.count("tokens/s · TTFT") == 3
    assert moert("chat", "-q", stdin="x", llm=FakeLLM(["y"])) == (0, "y\n", "")
    assert "warning: the model has no chat template" in moert("chat", llm=FakeLLM(template=None)).err


def test_chat_says_in_one_line_what_runs_and_the_rest_when_asked(moert: Program) -> None:
    line = " · fixed:4 · context 100 · budget 2.00 GiB · 38% of experts in memory"
    (err,) = moert("chat", "-m", "owner/My-Model", llm=FakeLLM()).err.splitlines()
    assert err == f"moert 0.1.0 · My-Model{line}"
    assert "sampling: temperature 0.6 (model)" in moert("chat", "-v", llm=FakeLLM()).err
    whole = FakeLLM()
    whole.resident_share, whole.device = 1.0, "Fake GPU"
    assert moert("chat", llm=whole).err.endswith(" · all experts in memory · Fake GPU\n")


def test_chat_without_a_terminal_knows_commands_but_answers_other_lines(moert: Program) -> None:
    llm = FakeLLM(["A"], ["B"])
    moert("chat", stdin="/usr/bin\n/clear\n/quit\nnever\n", llm=llm)
    assert llm.asked == [["/usr/bin"]]
    moert("chat", stdin='"""\n/quit\n', llm=llm)
    assert llm.asked[1:] == [["/quit"]]


def test_chat_survives_bytes_that_are_not_text(moert: Program) -> None:
    llm = FakeLLM(["a"], ["b"])
    assert moert("chat", "-q", stdin=b"\xff\nx\r\n", llm=llm).out == "a\nb\n"
    assert llm.asked == [["\ufffd"], ["\ufffd", "a", "x"]]


def test_chat_without_a_terminal_fails_as_a_program_does(moert: Program) -> None:
    assert moert("chat", "-q", stdin="x\ny\n", llm=FakeLLM([StoreError("Damaged.")])) == (1, "", "moert: Damaged.\n")
    assert moert("chat", "-q", stdin="x\ny\n", llm=FakeLLM(["a", KeyboardInterrupt()])) == (130, "a\n", "")


# chat with a terminal


def test_a_person_is_told_how_to_begin_and_how_to_end(moert: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "make_prompt", lambda: None)
    monkeypatch.setattr(chat, "interactive", lambda session, prompt: None)
    assert moert("chat", person=True, llm=FakeLLM()).err == (
        "moert 0.1.0 · the small built-in model · fixed:4 · context 100 · budget 2.00 GiB"
        " · 38% of experts in memory · /help for commands, Ctrl-D to quit\n"
    )
    assert moert("chat", "-q", person=True, llm=FakeLLM()).err == ""


class Terminal:
    """A chat with a person who types what `type` is given."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def type(self, keys: str, llm: Any, **params: Any) -> ChatSession:
        session = ChatSession(llm, llm.default_params.replace(**params), None, Status(), True)  # type: ignore[arg-type]
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            chat.interactive(session, PromptSession())
        self.out, self.err = self._capsys.readouterr()
        return session


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    before = signal.getsignal(signal.SIGINT)
    yield Terminal(capsys)
    assert signal.getsignal(signal.SIGINT) is before


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("leave", ["/exit\n", "/quit\n", "/bye\n", "\x04", "\x03\x03"])
def test_ways_to_leave(terminal: Terminal, leave: str) -> None:
    terminal.type("hello\n" + leave + "never\n\x04", llm := FakeLLM(["hi"], ["x"]))
    assert terminal.out == "hi\n"
    assert llm.asked == [["hello"]]
    assert ("Ctrl-C again quits" in terminal.err) == (leave == "\x03\x03")


def test_ctrl_c_at_the_prompt_only_counts_in_a_row(terminal: Terminal) -> None:
    terminal.type("\x03hello\n\x03bye\n\x04", llm := FakeLLM(["hi"], ["x"]))
    assert len(llm.asked) == 2
    assert terminal.err.count("Ctrl-C again quits") == 2


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(terminal: Terminal) -> None:
    llm = FakeLLM(["one ", ctrl_c, "two ", "three"], ["more"])
    terminal.type("q\nand\n\x04", llm)
    assert terminal.out == "one two \nmore\n"
    assert "(stopped)" in terminal.err
    assert llm.asked[1] == ["q", "one two ", "and"]


def test_ctrl_c_twice_or_before_the_first_token_breaks_in(terminal: Terminal) -> None:
    llm = FakeLLM(["one", ctrl_c, ctrl_c, "never"], [ctrl_c, "never"], ["three"])
    session = terminal.type("a\nb\nc\n\x04", llm)
    assert terminal.out == "one\nthree\n"
    assert [m["content"] for m in session.conversation.messages] == ["a", "one", "c", "three"]


def test_an_error_does_not_end_the_chat(terminal: Terminal) -> None:
    llm = FakeLLM([UsageError("The prompt does not fit the context.")], ["one", StoreError("Damaged.")], ["fine"])
    terminal.type("long\nb\nc\n\x04", llm)
    assert "moert: The prompt does not fit the context." in terminal.err
    assert "/clear empties the context" in terminal.err
    assert "moert: Damaged." in terminal.err
    assert llm.asked[1:] == [["b"], ["b", "one", "c"]]


def test_a_full_context_and_a_cut_answer_say_so(terminal: Terminal) -> None:
    terminal.type("a\n\x04", FakeLLM(["b"], finish="length"), max_tokens=50)
    assert "The context of 100 tokens is full: /clear" in terminal.err
    terminal.type("a\n\x04", FakeLLM(["b"], finish="length"), max_tokens=2)
    assert "(cut at max_tokens 2)" in terminal.err
    session = terminal.type("a\n\x04", FakeLLM([""]))
    assert "ended its answer before it began" in terminal.err
    assert session.conversation.turns == []


def test_regen_clear_and_system(terminal: Terminal) -> None:
    llm = FakeLLM(["1"], ["2"], ["3"], [StoreError("x")])
    session = terminal.type("/regen\na\n/regen\n/clear\n/system Be brief.\n/system\nb\n/regen\n\x04", llm, seed=5)
    assert "nothing to answer again" in terminal.err
    assert llm.asked[:3] == [["a"], ["a"], ["Be brief.", "b"]]
    assert [p.seed for p in llm.params] == [5, 6, 5, 6]
    assert terminal.err.count("System prompt: Be brief.") == 2
    assert [m["content"] for m in session.conversation.turns] == ["b", "3"]  # a failed /regen loses nothing


def test_set_and_stats_and_help(terminal: Terminal) -> None:
    keys = "/set\n/set temp 0.1\n/set top_k x\n/set top_p 9\n/set nope 1\n/set seed 4\n/set seed random\n"
    keys += "/stats\na\n/stats\n/help\n/sytem x\n/\n\x04"
    session = terminal.type(keys, FakeLLM(["1"]))
    assert session.params.temperature == 0.1
    assert session.params.seed is None
    for expected in (
        "temperature 0.6",
        "max_tokens 512",
        "seed random",
        "seed 4",
        "top_k cannot be 'x': it is a number.",
        "top_p is 9.0, but must be",
        "There is no setting 'nope'; /set lists them.",
        "There is no answer yet.",
        "peak_rss_bytes                      1.00 GiB",
        "waited_s_per_token                  0.0125",
        "bytes_prefetched_used_per_token     256 B",
        "width_histogram                     2 bits 25.0%, 4 bits 75.0%",
        "/regen",
        "There is no command /sytem; did you mean /system?",
        "There is no command /; see /help.",
    ):
        assert expected in terminal.err


def test_a_text_of_several_lines(terminal: Terminal) -> None:
    terminal.type('"""one\n/exit\n\nthree"""\n"""same line"""\n\x04', llm := FakeLLM(["1"], ["2"]))
    assert llm.asked == [["one\n/exit\n\nthree"], ["one\n/exit\n\nthree", "1", "same line"]]


def test_history_is_kept_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    path = chat.history_file()
    assert path == tmp_path / "s" / "moert" / "history"
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert chat.history_file() is None
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("x\n")
        assert chat.make_prompt().prompt() == "x"
