"""A model that says what a test wants, in place of `moert.api.LLM`, and a way to run the program with it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import pytest

from moert.cli import common, main
from moert.engine.sampling import ResolvedParams
from moert.errors import MoertError

Part = str | BaseException | Callable[[], object]


@dataclass
class Stats:
    prompt_tokens: int = 3
    cached_tokens: int = 0
    completion_tokens: int = 2
    ttft_s: float = 0.25
    prefill_tokens_per_s: float | None = 12.0
    decode_tokens_per_s: float | None = 8.5
    hit_ratio: float | None = 0.75
    bytes_read: int = 4096
    bytes_read_per_token: float = 2048.0
    peak_rss_bytes: int = 1 << 30
    budget_bytes: int = 2 << 30
    precision: str = "fixed:4"
    mean_width: float | None = 4.0
    seed: int = 77
    waited_s_per_token: float = 0.0125
    computed_s_per_token: float = 0.025
    bytes_on_demand_per_token: float = 1536.0
    bytes_prefetched_per_token: float = 512.0
    bytes_prefetched_used_per_token: float = 256.0
    bytes_prefetched_wasted_per_token: float = 128.0
    bytes_moved_per_token: float = 0.0
    device_share: float | None = 0.0
    width_histogram: dict[int, float] = field(default_factory=lambda: {2: 0.25, 4: 0.75})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class FakeLLM:
    """Gives one of `answers` after the other. Part of an answer: text, an exception to raise, something to call."""

    ctx_size = 100
    plan = None
    budget, precision, resident_share = 2 << 30, "fixed:4", 0.375
    device: str | None = None

    def __init__(self, *answers: Sequence[Part], template: str | None = "t", finish: str = "stop") -> None:
        self.answers, self.finish = list(answers), finish
        self.tokenizer = SimpleNamespace(chat_template=template, generation_config={"temperature": 0.6})
        self.default_params = ResolvedParams(temperature=0.6)
        self.store = SimpleNamespace(path=Path("/models/fake"))
        self.asked: list[Any] = []
        self.template_args: list[Any] = []
        self.params: list[ResolvedParams] = []
        self.closed = False

    def stream(self, prompt: Any, params: ResolvedParams) -> Iterator[Any]:
        self.asked.append(prompt)
        self.params.append(params)
        return self._play(self.answers.pop(0))

    def _play(self, parts: Sequence[Part]) -> Iterator[Any]:
        for i, part in enumerate(parts):
            if isinstance(part, BaseException):
                raise part
            if callable(part):
                part()
                continue
            finish = self.finish if i == len(parts) - 1 else None
            yield SimpleNamespace(text=part, token_ids=[i], finish_reason=finish, stats=Stats(), error=None)

    def stream_many(self, prompts: Sequence[Any], params: ResolvedParams) -> Iterator[Any]:
        """The next of each answer in turn, the last prompt's first; an error ends only its own."""
        each = list(enumerate(self.stream(prompt, params) for prompt in prompts))[::-1]
        while each:
            for item in list(each):
                try:
                    piece = next(item[1], None)
                except MoertError as error:
                    piece = SimpleNamespace(text="", token_ids=[], finish_reason="error", stats=Stats(), error=error)
                if piece is None or piece.finish_reason:
                    each.remove(item)
                if piece is not None:
                    yield item[0], piece

    def encode_chat(self, messages: list[dict[str, str]], *, template_args: Any = None) -> Any:
        self.template_args.append(template_args)
        return [m["content"] for m in messages]

    def stream_chat(
        self, messages: list[dict[str, str]], params: ResolvedParams, *, template_args: Any = None
    ) -> Iterator[Any]:
        return self.stream(self.encode_chat(messages, template_args=template_args), params)

    def generate(self, prompt: str, params: ResolvedParams) -> list[Any]:
        pieces = list(self.stream(prompt, params))
        text = "".join(p.text for p in pieces)
        return [SimpleNamespace(text=text, token_ids=[0, 1], finish_reason=self.finish, stats=pieces[-1].stats)]

    def chat(self, messages: list[dict[str, str]], params: ResolvedParams, *, template_args: Any = None) -> Any:
        return self.generate(self.encode_chat(messages, template_args=template_args), params)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.closed = True


class Terminal(io.TextIOWrapper):
    """An input that a person types."""

    def isatty(self) -> bool:
        return True


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Program:
    """Runs `moert` in this process: moert("generate", "-p", "x", stdin="...", llm=FakeLLM(...))."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def __call__(self, *argv: str, stdin: str | bytes = "", person: bool = False, llm: object = None) -> Result:
        """`llm` stands in for the model; an exception is raised where one would be loaded. `person`: is at stdin."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        kind = Terminal if person else io.TextIOWrapper
        self._monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(data), encoding="utf-8"))

        def open_llm(args: object, status: object) -> object:
            if isinstance(llm, BaseException):
                raise llm
            return llm

        if llm is not None:
            self._monkeypatch.setattr(common, "open_llm", open_llm)
        with pytest.raises(SystemExit) as caught:
            main.run(argv)
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        return Result(int(caught.value.code or 0), out, err)


def evaluator(program: Program, folder: Path, text: str, window: int) -> Callable[..., Result]:
    """`moert eval` on `text`, or on the file `text=` of a call, in windows of `window` tokens."""
    (folder / "text.txt").write_text(text, encoding="utf-8")

    def run(*argv: object, text: Path = folder / "text.txt") -> Result:
        return program("eval", "--text", str(text), "--window", str(window), *map(str, argv))

    return run
