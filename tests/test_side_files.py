"""The small files beside the weights: checked before a conversion, copied by it, and no reason to refuse a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moert.api import LLM
from moert.convert.convert import convert
from moert.engine.sampling import ResolvedParams, SamplingParams
from moert.errors import CheckpointError, UsageError

from .checkpoints import folder_bytes, make_checkpoint, refusal
from .program import FakeLLM, Program

ONE = SamplingParams(max_tokens=1, temperature=0)


def test_what_a_chat_needs_is_checked_before_the_work(tmp_path: Path) -> None:
    def refused(name: str, text: str, *parts: str) -> None:
        source = make_checkpoint(tmp_path / f"src-{name}")
        (source / name).write_text(text)
        refusal(lambda: convert(source, tmp_path / "out"), CheckpointError, *parts)
        assert not (tmp_path / "out.partial").exists()

    refused("tokenizer.json", "{", "tokenizer.json is not a valid tokenizer")
    refused("added_tokens.json", '{"x": "y"}', "x has no number for its id")
    refused("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON")
    refused("chat_template.jinja", "{% for %}", "chat template has a syntax error in line 1", "Correct it")


def test_defaults_that_cannot_be_used_are_warnings(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    for number, (text, warning) in enumerate(
        {'{"temperature": "hot"}': "temperature is 'hot'", '{"top_p": 0.9,}': "not valid JSON"}.items()
    ):
        (source / "generation_config.json").write_text(text)
        said: list[str] = []
        convert(source, tmp_path / f"out-{number}", on_status=said.append)
        assert len(said) == 1
        assert warning in said[0]
    (source / "generation_config.json").write_text('{"top_k": -1, "temperature": null}')
    (source / "added_tokens.json").write_text(json.dumps({f"<{i}>": i for i in range(1, 60)}))
    said = []
    convert(source, tmp_path / "out", on_status=said.append)
    assert len(said) == 1
    assert "has 10 tokens, such as '<50>', beyond the 50" in said[0]


def test_every_file_of_the_tokenizer_is_copied(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    names = ["chat_template.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"]
    for name in names:
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    names += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    for name in names[-2:]:
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    copied = folder_bytes(tmp_path / "out")
    assert {name: copied[name] for name in names} == {name: (source / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("text", "warning"), [('{"temperature": "hot"}', "temperature is 'hot'"), ('{"top_p": 0.9,}', "not valid JSON")]
)
def test_a_store_with_unusable_defaults_opens_with_a_warning(
    store: Callable[..., Path], tmp_path: Path, text: str, warning: str
) -> None:
    folder = Path(shutil.copytree(store("qwen3_moe"), tmp_path / "store"))
    (folder / "generation_config.json").write_text(text)
    said: list[str] = []
    with LLM(folder, on_status=said.append) as llm:
        assert llm.default_params == ResolvedParams()
        assert sum(warning in line for line in said) == 1
        assert llm.generate("The", ONE)[0].finish_reason == "length"


def test_shapes_of_conversations_and_template_arguments_reach_the_template(
    store: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(store("qwen3_moe"), tmp_path / "store"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
        "{% if enable_thinking is false %}quiet{% endif %}{{ note }}"
    )
    with LLM(folder) as llm:
        eos = llm.tokenizer.eos or ""

        def text(*args: object, **options: object) -> str:
            return llm.tokenizer.decode(llm.encode_chat(*args, **options), skip_special_tokens=False)  # type: ignore[arg-type]

        message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
        assert text("Hello") == text(message) == text([message]) == "Hello" + eos
        arguments = {"enable_thinking": False, "note": "!"}
        assert text("Hello", template_args=arguments) == f"Hello{eos}quiet!"
        assert llm.chat("Hello", ONE, template_args=arguments).stats.prompt_tokens == len(
            llm.encode_chat("Hello", template_args=arguments)
        )
        with pytest.raises(UsageError, match="Message 1 has no content"):
            llm.chat([{"role": "assistant", "content": None}])
        with pytest.raises(UsageError, match="messages is set by moert"):
            llm.stream_chat("Hello", template_args={"messages": []})


@pytest.fixture
def moert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    return Program(capsys, monkeypatch, tmp_path)


def test_options_become_template_arguments(moert: Program) -> None:
    llm = FakeLLM(["A"], ["B"], ["C"], ["D"])
    options = ("--no-think", "--template-arg", "note=a=b", "--template-arg", "n=3")
    expected = {"enable_thinking": False, "note": "a=b", "n": 3}
    moert("generate", "--chat", "-p", "Q", *options, llm=llm)
    moert("generate", "--chat", "--json", "-p", "Q", *options, llm=llm)
    moert("chat", *options, stdin="Q\n", llm=llm)
    moert("chat", "--no-think", "--template-arg", "enable_thinking=true", stdin="Q\n", llm=llm)
    assert llm.template_args == [expected, expected, expected, {"enable_thinking": True}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chat", "--template-arg", "note"), "--template-arg note is not of the form KEY=VALUE"),
        (("--chat", "--template-arg", "messages=[]"), "Template argument messages is set by moert"),
        (("--no-think",), "--template-arg and --no-think need --chat"),
    ],
)
def test_template_options_that_cannot_be(moert: Program, options: tuple[str, ...], message: str) -> None:
    result = moert("generate", "-p", "Q", *options, llm=FakeLLM(["A"]))
    assert (result.code, result.err.startswith(f"moert: {message}")) == (2, True), result.err
