"""`moert generate` with several prompts, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moert.errors import StoreError

from .program import FakeLLM, Program


@pytest.fixture
def moert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return Program(capsys, monkeypatch, tmp_path)


def test_texts_stand_in_the_order_of_the_prompts_under_their_titles(moert: Program) -> None:
    llm = FakeLLM(["a", "b", "c"], ["d"], ["e", "f"])
    result = moert("generate", "-p", "one\n two", "-p", "x" * 90, "-p", "three", "--temp", "0", llm=llm)
    assert result.code == 0
    assert result.out == f"==> 1: one two <==\nabc\n\n==> 2: {'x' * 57}... <==\nd\n\n==> 3: three <==\nef\n"
    assert {p.temperature for p in llm.params} == {0}
    assert "3 prompts · 6 tokens in" in result.err


def test_json_is_one_line_for_each_prompt_in_their_order(moert: Program) -> None:
    llm = FakeLLM(["a", "b"], ["c"])
    result = moert("generate", "--json", "-p", "one", "-p", "two", llm=llm)
    alone = json.loads(moert("generate", "--json", "-p", "one", llm=FakeLLM(["a"])).out)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["text"] for line in lines] == ["ab", "c"]
    assert all(line.keys() == alone.keys() for line in lines)


def test_prompts_come_from_files_too(moert: Program, tmp_path: Path) -> None:
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_bytes("one\r\n\n  two é\n".encode())
    objects.write_text('"a\\nb"\n\n{"prompt": "c"}\n')
    for argv, want in (
        (["--prompts", lines], ["one", "  two é"]),
        (["--prompts", objects], ["a\nb", "c"]),
        (["-p", "first", "--prompts", lines], ["first", "one", "  two é"]),
        (["-f", lines, "--prompts", objects], ["one\r\n\n  two é", "a\nb", "c"]),
    ):
        llm = FakeLLM(*(["x"] for _ in want))
        assert moert("generate", *map(str, argv), llm=llm).code == 0
        assert llm.asked == want


def test_chat_makes_a_conversation_of_each_prompt(moert: Program) -> None:
    llm = FakeLLM(["a"], ["b"])
    moert("generate", "--chat", "-sys", "S", "-p", "Q", "-p", "R", llm=llm)
    assert llm.asked == [["S", "Q"], ["S", "R"]]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_that_fails_leaves_the_others(moert: Program, as_json: bool) -> None:
    llm = FakeLLM(["b"], ["a", StoreError("Expert 3 is damaged.")], ["x"])
    result = moert("generate", "-p", "1", "-p", "2", "-p", "3", *(["--json"] if as_json else []), llm=llm)
    assert result.code == 1
    assert "moert: Prompt 2 of 3: Expert 3 is damaged." in result.err
    if as_json:
        lines = [json.loads(line) for line in result.out.splitlines()]
        assert [line["finish_reason"] for line in lines] == ["stop", "error", "stop"]
        assert [line.get("error") for line in lines] == [None, "Expert 3 is damaged.", None]
    else:
        assert result.out == "==> 1: 1 <==\nb\n\n==> 2: 2 <==\na\n\n==> 3: 3 <==\nx\n"


def test_ctrl_c_keeps_what_has_ended(moert: Program) -> None:
    answers = FakeLLM(["a"], ["b", KeyboardInterrupt()], ["c"])
    result = moert("generate", "-q", "-p", "1", "-p", "2", "-p", "3", llm=answers)
    assert result == (130, "==> 1: 1 <==\na\n\n==> 2: 2 <==\nb\n\n==> 3: 3 <==\nc\n", "")
    answers = FakeLLM(["a", KeyboardInterrupt()], ["b"], ["c", "d"])
    result = moert("generate", "-q", "--json", "-p", "1", "-p", "2", "-p", "3", llm=answers)
    assert result.code == 130
    assert [json.loads(line)["text"] for line in result.out.splitlines()] == ["b", "cd"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "p.txt holds no prompt."),
        ("p.txt", b"a\n\xff", "p.txt is not UTF-8 text."),
        ("p.jsonl", b'"a"\n{"prompt": 3}\n', 'Line 2 of FILE is neither a string nor an object with a "prompt" and'),
        ("p.jsonl", b'{"prompt": "x", "seed": 3}\n', "Line 1 of FILE is neither a string nor"),
        ("p.jsonl", b'""\n', "Line 1 of FILE is neither a string nor"),
        ("p.jsonl", b'"a"\nb\n', "Line 2 of FILE is not JSON."),
        ("missing", None, "FILE: No such file or directory."),
    ],
)
def test_files_that_hold_no_prompts_are_refused(
    moert: Program, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = moert("generate", "--prompts", str(path), llm=FakeLLM())
    assert (result.code, result.out) == (1 if content is None else 2, "")
    assert message.replace("FILE", str(path)) in result.err


def test_empty_prompts_and_wrong_options_are_refused(moert: Program) -> None:
    assert moert("generate", "-p", "a", "-p", "") == (2, "", "moert: The prompt 2 of 2 is empty.\n")
    result = moert("generate", "-q", "-p", "a", "-p", "b", "--batch-size", "0")
    assert result == (2, "", "moert: --batch-size 0 must be at least 1.\n")
    result = moert("generate", "-q", "-p", "a", "-p", "import os " * 30, "-c", "32")
    assert (result.code, result.out) == (2, "")
    assert "moert: Prompt 2 of 2: The prompt of" in result.err


def test_the_program_with_its_own_model(moert: Program) -> None:
    options = ("-q", "--seed", "5", "-n", "6", "--json", "-c", "64")
    together = moert("generate", *options, "-p", "import os", "-p", "def main(", "--batch-size", "2").out.splitlines()
    alone = [moert("generate", *options, "-p", prompt).out for prompt in ("import os", "def main(")]
    for got, want in zip(map(json.loads, together), map(json.loads, alone), strict=True):
        assert (got["text"], got["token_ids"], got["seed"]) == (want["text"], want["token_ids"], 5)
