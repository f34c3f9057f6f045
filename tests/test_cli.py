"""The command line as a user meets it: what goes to stdout and stderr, exit codes, and every error in one sentence."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from moert.cli import common, main, progress
from moert.cli.options import Parser, add_settings, settings_of
from moert.cli.status import Status
from moert.config import EngineConfig
from moert.convert.convert import ConvertProgress
from moert.errors import BudgetError, StoreError, UsageError
from moert.hub import resolve as source

from .child import ENVIRONMENT, PYTHON
from .program import FakeLLM, Program

ROOT = Path(main.__file__).parents[2]


@pytest.fixture
def moert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return Program(capsys, monkeypatch, tmp_path)


# The program as a whole


def test_no_command_unknown_commands_and_options(moert: Program) -> None:
    assert moert() == moert("--help")
    assert moert().code == 0
    assert moert("chta") == (2, "", "moert: There is no command 'chta'; did you mean chat?\n")
    assert "moert --help lists them" in moert("zzz").err
    assert moert("--bogus", "chat").err == "moert: Options stand after the command: moert COMMAND --bogus ...\n"
    required = {"convert": ["a", "b"], "simulate": ["--trace", "a"]}
    for command in main.COMMANDS:
        result = moert(command, *required.get(command, []), "--bogus")
        more = f"moert {command} --help lists the options"
        assert result == (2, "", f"moert {command}: there is no option --bogus; {more}.\n")
        assert moert(command, "--help").out.startswith(f"usage: moert {command}")
    assert moert("--version") == moert("-V") == (0, "moert 0.1.0\n", "")
    assert all(command in moert("--help").out for command in main.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("chat", "--tempp", "1"), "moert chat: there is no option --tempp; did you mean --temp?"),
        (("generate", "--memory_budget=1GiB"), "moert generate: there is no option --memory_budget; did you mean"),
        (("chat", "hello"), "moert chat: 'hello' is one argument too many; moert chat --help lists the options."),
        (("convert", "a"), "moert convert: OUT is missing; moert convert --help lists the options."),
        (("chat", "--temp"), "moert chat: --temp: expected one argument; moert chat --help lists the options."),
        (("chat", "--top-k", "x"), "moert chat: --top-k: 'x' is not a whole number;"),
        (("chat", "--dense-bits", "5"), "moert chat: --dense-bits: 5 is not one of 4, 6, 8, 16;"),
        (("chat", "-q", "-v"), "moert chat: -v/--verbose: not allowed with argument -q/--quiet;"),
        (("chat", "-c", "long"), "moert: --ctx-size 'long' is not a whole number."),
        (("chat", "--kv-bits", "4"), "moert: --kv-bits '4' is not known; it can be 8 or 16."),
        (("chat", "--device", "tpu"), "moert: --device 'tpu' is not known; it can be auto, cpu, cuda, emulated or"),
        (("chat", "--cache-policy", "best"), "moert: --cache-policy 'best' is not known; it can be score, lru or lfu."),
        (("chat", "--memory-budget", "lots"), "moert: --memory-budget 'lots' is not a size; write for example 2GiB"),
        (("plan", "--device", "x"), "moert plan: --device is called --profile here."),
        (("simulate", "--device=x"), "moert simulate: --device is called --profile here."),
        (("simulate", "--policy", "lru"), "moert simulate: --policy is called --cache-policy here."),
    ],
)
def test_a_wrong_option_is_one_sentence(moert: Program, argv: tuple[str, ...], message: str) -> None:
    result = moert(*argv)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(message)


def test_options_are_made_from_the_fields_of_the_configuration() -> None:
    parser = Parser("moert")
    add_settings(parser, [f.name for f in fields(EngineConfig)], device="cpu")
    shown = parser.format_help()
    for f in fields(EngineConfig):
        assert f"--{f.name.replace('_', '-')}" in shown
    assert "(default cpu)" in shown
    assert settings_of(parser.parse_args([])) == {"device": "cpu"}
    given = parser.parse_args(
        ["--memory-budget", "auto", "--device-budget", "1KiB", "--no-hybrid", "--overlap", "-c", "9", "--prefetch", "2"]
    )
    wanted = {"memory_budget": "auto", "device_budget": 1024, "hybrid": False, "overlap": True, "ctx_size": 9}
    assert settings_of(given) == {**wanted, "prefetch": "2", "device": "cpu"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StoreError("The store is damaged."), 1, "moert: The store is damaged.\n"),
        (UsageError("Bad."), 2, "moert: Bad.\n"),
        (BudgetError("Does not fit.", 5), 2, "moert: Does not fit.\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "moert: /x: Permission denied.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "moert: No space left on device.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_sentence_and_a_code(moert: Program, error: Exception, code: int, message: str) -> None:
    assert moert("generate", "-p", "x", llm=error) == (code, "", message)


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [*PYTHON, "-m", "moert", "doctor", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_help_needs_no_torch() -> None:
    code = "import sys; from moert.cli.main import run\n"
    code += "try: run(sys.argv[1:])\nfinally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    for command in main.COMMANDS:
        argv = [*PYTHON, "-c", code, command, "--help"]
        done = subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT)
        assert (done.returncode, done.stderr) == (0, "set()\n")


# generate


def test_generate_streams_text_to_stdout_and_status_to_stderr(moert: Program) -> None:
    llm = FakeLLM(["Hel", "lo"])
    result = moert("generate", "-p", "Hi", "--temp", "0.5", "--stop", "a", "--stop", "b", "-n", "9", llm=llm)
    assert result.out == "Hello\n"
    assert llm.closed
    assert llm.asked == ["Hi"]
    assert (llm.params[0].temperature, llm.params[0].stop, llm.params[0].max_tokens) == (0.5, ("a", "b"), 9)
    line, speeds = result.err.splitlines()
    assert line == (
        "moert 0.1.0 · the small built-in model · fixed:4 · context 100 · budget 2.00 GiB · 38% of experts in memory"
    )
    assert speeds.startswith("2 tokens · 8.5 tokens/s · TTFT 0.25 s · prompt 3 at 12 tokens/s · cache hits 75%")
    assert speeds.endswith(" · seed 77")
    assert "\x1b" not in result.err
    told = moert("generate", "-v", "-p", "x", "--top-p", "0.5", llm=FakeLLM(["y"])).err
    assert "temperature 0.6 (model), top_k 0 (default), top_p 0.5 (option)" in told
    assert moert("generate", "-p", "x", "-q", llm=FakeLLM(["y"])).err == ""


def test_control_characters_are_kept_from_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common.write_text("a\x1b[2J\n\t\r")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    common.write_text("é\x1b[2J\n\t\x9b")
    assert capsys.readouterr().out == "a\x1b[2J\n\t\ré[2J\n\t"


def test_generate_json_is_one_object(moert: Program) -> None:
    result = moert("generate", "-p", "Hi", "--json", llm=FakeLLM(["Hel", "lo"]))
    data = json.loads(result.out)
    wanted = (
        "text token_ids prompt_tokens completion_tokens ttft_s prefill_tokens_per_s decode_tokens_per_s hit_ratio "
        "bytes_read bytes_read_per_token peak_rss_bytes budget_bytes precision mean_width finish_reason seed model"
    )
    assert set(wanted.split()) <= set(data)
    assert (data["text"], data["finish_reason"], data["model"]) == ("Hello", "stop", "/models/fake")


def test_generate_takes_its_prompt_from_stdin_or_a_file(moert: Program, tmp_path: Path) -> None:
    llm = FakeLLM(["a"], ["b"])
    moert("generate", stdin="one\ntwo\n", llm=llm)
    (tmp_path / "p.txt").write_text("from é\n\n")
    moert("generate", "-f", str(tmp_path / "p.txt"), llm=llm)
    assert llm.asked == ["one\ntwo", "from é\n"]


def test_generate_chat_uses_messages(moert: Program) -> None:
    llm = FakeLLM(["a"], ["b"])
    moert("generate", "--chat", "-sys", "S", "-p", "Q", llm=llm)
    assert llm.asked == [["S", "Q"]]
    llm.tokenizer.chat_template = None
    result = moert("generate", "--chat", "--json", "-p", "Q", llm=llm)
    assert "no chat template" in result.err
    assert json.loads(result.out)["text"] == "b"


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        ((), b"", "moert: The prompt is empty."),
        (("-p", ""), b"", "moert: The prompt is empty."),
        ((), b"\xff\xfe", "moert: The prompt in stdin is not UTF-8 text."),
        (("-f", "BINARY"), b"", "is not UTF-8 text."),
        (("-p", "x", "-sys", "y"), b"", "moert: A system prompt (-sys) needs --chat"),
        (("-p", "x", "-f", "y"), b"", "not allowed with argument"),
        (("-p", "x", "--temp", "hot"), b"", "--temp: 'hot' is not a number;"),
        (("-p", "x", "--temp", "-1"), b"", "moert: temperature is -1.0, but must be"),
        (("-p", "x", "-n", "0"), b"", "moert: max_tokens is 0, but must be"),
        (("-p", "x", "--stop", ""), b"", "moert: stop is"),
        (("-p", "x", "--widths", "2;3"), b"", "'2;3' is neither a list of whole numbers such as 2,3,4 nor auto"),
    ],
)
def test_generate_refuses(moert: Program, tmp_path: Path, argv: tuple[str, ...], stdin: bytes, message: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    argv = tuple(str(tmp_path / "binary") if a == "BINARY" else a for a in argv)
    result = moert("generate", *argv, stdin=stdin, llm=FakeLLM(["x"]))
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_generate_without_a_prompt_on_a_terminal(moert: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(prompt=None, file=None, prompts=None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    from moert.cli.generate import _prompts

    with pytest.raises(UsageError, match="There is no prompt"):
        _prompts(args)  # type: ignore[arg-type]


def test_generate_names_a_file_that_is_missing(moert: Program) -> None:
    assert moert("generate", "-f", "/missing") == (1, "", "moert: /missing: No such file or directory.\n")


def test_ctrl_c_while_generating_keeps_the_text(moert: Program) -> None:
    assert moert("generate", "-q", "-p", "x", llm=FakeLLM(["some", KeyboardInterrupt()])) == (130, "some\n", "")


def test_the_model_option_reaches_source_and_engine(moert: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moert("generate", "-p", "x", "-m", "/missing/model").code == 1
    seen: dict[str, Any] = {}

    def resolve(model: str, **options: object) -> Path:
        seen.update(options, model=model)
        return Path("/resolved")

    def llm(path: Path, **options: object) -> object:
        seen.update(options, path=path)
        return FakeLLM(["y"])

    monkeypatch.setattr(source, "resolve", resolve)
    monkeypatch.setitem(sys.modules, "moert.api", SimpleNamespace(LLM=llm))  # type: ignore[arg-type]
    options = "--memory-budget 2GiB --expert-budget 1GiB --precision fixed:3 -c 64 -t 2 --offline --widths 3,4"
    assert moert("generate", "-p", "x", "-m", "o/m", *options.split()).out == "y\n"
    assert (seen["model"], seen["path"], seen["widths"], seen["offline"]) == ("o/m", Path("/resolved"), (3, 4), True)
    assert (seen["memory_budget"], seen["expert_budget"], seen["precision"]) == (2 << 30, 1 << 30, "fixed:3")
    assert (seen["ctx_size"], seen["threads"], seen["batch_size"]) == (64, 2, 1)
    assert "prefetch" not in seen, "what no option gives is left to LLM"


# convert, info, doctor


def test_convert(moert: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def convert(src: Path, out: Path, **options: Any) -> object:
        calls.append((src, out, options))
        for done, left in ((0, None), (25, 9000.0), (50, 480.0), (75, 29.7), (100, 0.0)):
            options["progress"](ConvertProgress("experts", done, 100, 0, done / 200, left))
        out.mkdir()
        (out / "moert.json").write_bytes(bytes(2048))
        return SimpleNamespace(path=out)

    monkeypatch.setitem(sys.modules, "moert.convert.convert", SimpleNamespace(convert=convert))  # type: ignore[arg-type]
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text("{}")
    result = moert("convert", str(tmp_path / "src"), str(tmp_path / "out"), "--widths", "2,4", "--resume", "--fast")
    assert (result.code, result.out) == (0, "")
    assert f"(widths 2,4, groups of 64, dense 8 bits) into {tmp_path / 'out'}, rounded." in result.err
    assert re.findall(r"experts: (.*)", result.err) == [
        *("0%", "12%, 2.5 h left", "25%, 8 min left", "38%, 30 s left", "50%, 0 s left"),
    ]
    assert "Done: 2.0 KiB" in result.err
    options = calls[0][2]
    assert (options["widths"], options["group_size"], options["dense_bits"], options["resume"]) == ((2, 4), 64, 8, True)
    again = moert("convert", "o/m", str(tmp_path / "out"))
    assert (again.code, again.err) == (
        1,
        f"moert: {tmp_path / 'out'} exists already: delete it or choose another name.\n",
    )
    missing = moert("convert", str(tmp_path / "none"), "out")
    assert missing.code == 1
    assert "There is no folder" in missing.err


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    status = Status()
    monkeypatch.setattr(type(status.console), "is_terminal", True)
    with progress.conversion_progress(status) as report:
        assert report is not None
        for done in (10, 20):
            report(ConvertProgress("experts", done, 100, 5, share=0.07, seconds_left=600.0))
    shown = capsys.readouterr().err
    assert "experts" in shown
    assert "7%" in shown
    assert "10 min left" in shown
    with progress.conversion_progress(Status(quiet=True)) as report:
        assert report is None


def test_info_of_what_is_not_converted(moert: Program, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = moert("info", "-m", str(tmp_path))
    assert result.code == 2
    assert "is not converted yet" in result.err
    assert moert("info", "-m", "/missing").code == 1


def test_doctor(moert: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = moert("doctor")
    assert result.code == 0
    for name in ("moert", "torch", "CPU", "kernel", "cores", "memory", "O_DIRECT", "GPU", "Hugging Face", "usable"):
        assert name in result.out
    data = json.loads(moert("doctor", "--json").out)
    assert data["usable"] is True
    assert {f["state"] for f in data["findings"]} <= {"ok", "note"}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    result = moert("doctor")
    assert result.code == 1
    assert "set MOERT_CACHE to a folder that can" in result.out
    assert "install it again" in result.out


def test_doctor_says_when_reads_are_buffered(moert: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moert.runtime.transfer.direct_io_works", lambda path: False)
    assert "reads are buffered" in moert("doctor").out


# all of it, on a real (tiny) model


def test_from_checkpoint_to_chat(moert: Program, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, store = str(tiny_checkpoint("olmoe")), str(tmp_path / "store")
    assert moert("convert", checkpoint, store, "-q") == (0, "", "")

    facts = json.loads(moert("info", "-m", store, "--json", "--verify").out)
    assert facts["family"] == "olmoe"
    assert [w["precision"] for w in facts["widths"]] == ["fixed:2", "fixed:3", "fixed:4"]
    # The checkpoint's own count: what safetensors files hold, as no weight is tied or left out.
    tensors = safe_open(Path(checkpoint) / "model.safetensors", "pt")
    sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    assert facts["parameters"] == sum(sizes)
    assert facts["disk_bytes"] == sum(f.stat().st_size for f in Path(store).iterdir())
    shown = moert("info", "-m", store).out
    assert "bits per weight" in shown
    assert "the error that was measured for each expert" in facts["elastic_precision"]
    assert f"{sum(sizes):,}" in shown

    options = ("-m", store, "--seed", "3", "-n", "6", "--ignore-eos", "-p", "Hello")
    streamed = moert("generate", *options)
    assert streamed.code == 0
    assert " · fixed:4 · context 512 · budget " in streamed.err
    assert "memory budget" in moert("generate", *options, "-v").err
    data = json.loads(moert("generate", *options, "--json").out)
    assert data["text"] + "\n" == streamed.out
    assert (data["completion_tokens"], data["seed"], data["model"]) == (6, 3, store)
    asked = json.loads(moert("generate", "--chat", "--json", *options).out)
    chatted = moert("chat", *options[:-2], stdin="Hello\nand?\n")
    assert chatted.out.startswith(asked["text"])
    assert "cached" in chatted.err.splitlines()[-2]

    assert moert("chat", "-m", store, "--precision", "fixed:9").code == 2
    assert moert("generate", "-m", store, "-p", "x", "--memory-budget", "1MiB").code == 2
    assert moert("chat", "-m", store, "--memory-budget", "lots", stdin="x").code == 2
    assert moert("generate", "-m", store, "-p", "Hello " * 500).code == 2

    rounded = str(tmp_path / "rounded")
    assert moert("convert", checkpoint, rounded, "-q", "--fast") == (0, "", "")
    facts = json.loads(moert("info", "-m", rounded, "--json").out)
    assert facts["quantiser"] == "round-to-nearest"
    assert facts["routed_precision"] == "thresholds on the router's weights"
    assert facts["elastic_precision"] == "by the errors of each expert's weights"


def test_a_checkpoint_is_converted_when_it_is_first_used(moert: Program, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = str(tiny_checkpoint("olmoe"))
    options = ("-m", checkpoint, "-n", "2", "--widths", "3", "--temp", "0", "-p", "Hello")
    first, again = moert("generate", *options), moert("generate", *options)
    assert f"Converting {checkpoint} once" in first.err
    assert "Converting" not in again.err
    assert first.out == again.out
    assert json.loads(moert("info", "-m", checkpoint, "--widths", "3", "--json").out)["source"] == checkpoint
