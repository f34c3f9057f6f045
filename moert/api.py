"""The Python interface: `LLM`, what it returns, and what it counts."""

# T tokens, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moert.chat import render
from moert.config import EngineConfig, parse_bytes
from moert.engine import Engine
from moert.errors import UsageError
from moert.recording import Recorder
from moert.runtime.telemetry import Counters, peak_rss_bytes
from moert.sampling import Sampler, SamplingParams, StopMatcher
from moert.source import resolve
from moert.store.reader import Store
from moert.tokenizer import Tokenizer

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one answer took. Times in seconds, sizes in bytes; None where there was nothing to measure.

    cached_tokens: prompt tokens found in the KV cache. ttft_s: from the call to the first token. hit_ratio (share of
    expert uses that were in memory), bytes_read_per_token and mean_width (bits per weight) are those of decoding, or
    of the prompt where nothing was decoded; bytes_read counts both.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    hit_ratio: float | None
    bytes_read: int
    bytes_read_per_token: float
    peak_rss_bytes: int
    budget_bytes: int
    precision: str
    mean_width: float | None
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it is made. finish_reason is None until the last piece: `stop` or `length`."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stats: GenerationStats


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. finish_reason: `stop` (end token or stop string) or `length` (max_tokens or context full)."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats


class LLM:
    """A model ready to answer.

    model: a store, a checkpoint folder or a hub id (converted once into the cache folder); None is the model that
    ships with the package. memory_budget: for everything, `"2GiB"` or bytes. expert_budget: for the expert arena
    alone. precision: `"fixed:4"`, `"routed:3"` for a mean, `"elastic:3"` for a bound; None is the widest stored.
    kv_bits: 8 or 16, of the KV cache. cache_policy, load_order, prefetch and overlap: see `EngineConfig`. on_status
    gets lines that say what was chosen.
    Raises MoertError; see `moert.errors` for its kinds.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        memory_budget: int | str | None = None,
        expert_budget: int | str | None = None,
        precision: str | None = None,
        ctx_size: int | None = None,
        threads: int | None = None,
        kv_bits: int | None = None,
        cache_policy: str = "score",
        load_order: str = "hottest",
        prefetch: str = "auto",
        overlap: bool = True,
        offline: bool = False,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        config = EngineConfig(
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget, "memory-budget"),
            expert_budget=None if expert_budget is None else parse_bytes(expert_budget, "expert-budget"),
            precision=precision,
            ctx_size=ctx_size,
            threads=threads,
            kv_bits=kv_bits,
            cache_policy=cache_policy,
            load_order=load_order,
            prefetch=prefetch,
            overlap=overlap,
        )
        self.description: list[str] = []

        def status(line: str) -> None:
            self.description.append(line)
            if on_status is not None:
                on_status(line)

        path = resolve(None if model is None else str(model), offline=offline, on_status=status)
        self.store = Store.open(path)
        self.tokenizer = Tokenizer(path)
        self.default_params = SamplingParams.from_generation_config(self.tokenizer.generation_config)
        self._engine = Engine(self.store, config, status)
        self._latest: object = None  # the request that the KV cache belongs to
        self._recorders: list[Recorder] = []

    @property
    def budget(self) -> int:
        """Bytes that peak resident memory stays below."""
        return self._engine.budget.total

    @property
    def ctx_size(self) -> int:
        """Tokens that the context holds."""
        return self._engine.ctx_size

    @property
    def engine(self) -> Engine:
        """Tokens in, logits out, with its counters: for measuring. Using it moves the KV cache under `stream`."""
        return self._engine

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Continue each prompt; the results are in the order of the prompts."""
        return [_join(self.stream(p, params)) for p in ([prompts] if isinstance(prompts, str) else prompts)]

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation: messages with `role` and `content`."""
        return _join(self.stream_chat(messages, params))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer a conversation, piece by piece. What the KV cache holds of it is not computed again."""
        text = render(messages, self.tokenizer.chat_template, bos=self.tokenizer.bos, eos=self.tokenizer.eos)
        return self.stream(self.tokenizer.encode(text, add_special_tokens=False), params)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue a prompt (text or token ids), piece by piece; the last piece has the finish reason.

        Raises UsageError for an empty prompt and for one that does not fit the context.
        """
        params = params or self.default_params
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check(ids)
        return self._run(ids, params)

    def _check(self, ids: Sequence[int], answer: int = 1) -> None:
        if not ids:
            raise UsageError("The prompt is empty; give at least one token.")
        vocab_size = self.store.architecture.vocab_size
        if not all(0 <= i < vocab_size for i in ids):
            raise UsageError(f"The prompt holds token ids outside the vocabulary of {vocab_size}.")
        if len(ids) + answer > self.ctx_size:
            raise UsageError(
                f"The prompt of {len(ids)} tokens does not fit the context of {self.ctx_size}; "
                "shorten it or raise --ctx-size."
            )

    def _run(self, ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        engine, sampler = self._engine, Sampler(params)
        self._latest = request = object()
        detokenizer, matcher = self.tokenizer.detokenizer(), StopMatcher(params.stop)
        meter = _Meter(engine, sampler.seed, len(ids))
        cached = _common_prefix(engine.tokens, ids[:-1])
        engine.rewind(cached)
        logits = engine.forward(ids[cached:])
        meter.prefilled(cached)
        out: list[int] = []
        new: list[int] = []
        while True:
            token = sampler(logits, engine.tokens)
            out.append(token)
            new.append(token)
            ended = token in self.tokenizer.eos_ids and not params.ignore_eos
            text = "" if ended else matcher.push(detokenizer.push(token))
            full = len(out) >= params.max_tokens or len(engine.tokens) + 1 > engine.ctx_size
            stop = ended or matcher.stopped
            if stop or full:
                if not matcher.stopped:
                    text += matcher.push(detokenizer.flush())
                    text += matcher.flush()
                    stop = stop or matcher.stopped
                yield Piece(text, new, "stop" if stop else "length", meter.stats(len(out)))
                return
            if text:
                yield Piece(text, new, None, meter.stats(len(out)))
                new = []
            if self._latest is not request:
                raise UsageError("Another request began on this model before this answer ended; take them in turn.")
            logits = engine.forward([token])

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of every position: float32 [T, V]. Starts from an empty context. The result is not in the budget."""
        ids = list(token_ids)
        self._check(ids, answer=0)
        self._latest = None
        self._engine.rewind(0)
        return self._engine.forward(ids, all_logits=True)

    def record_trace(self, path: Path | str) -> None:
        """Write from now on, until the model is closed, which experts each token is routed to, for `moert simulate` and
        `moert train-predictor`. OSError where the file cannot be written."""
        self._recorders.append(Recorder(self.store, self._engine.decoder, Path(path)))

    def close(self) -> None:
        """End the reading threads and what is recorded; the object is of no use afterwards."""
        try:
            while self._recorders:
                self._recorders.pop().close()
        finally:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Meter:
    """Times and counts of one answer."""

    def __init__(self, engine: Engine, seed: int, prompt_tokens: int) -> None:
        self._engine, self._seed, self._prompt_tokens = engine, seed, prompt_tokens
        self._start = self._first = time.perf_counter()
        self._before = engine.counters.copy()
        self._cached = 0
        self._after_prefill: Counters = self._before

    def prefilled(self, cached: int) -> None:
        self._first = time.perf_counter()
        self._cached = cached
        self._after_prefill = self._engine.counters.copy()

    def stats(self, completion_tokens: int) -> GenerationStats:
        steps = completion_tokens - 1  # the first token comes out of the prompt's forward pass
        now, counters = time.perf_counter(), self._engine.counters
        phase = counters.since(self._after_prefill if steps else self._before)
        prefill_s = self._first - self._start
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=completion_tokens,
            ttft_s=prefill_s,
            prefill_tokens_per_s=(self._prompt_tokens - self._cached) / prefill_s if prefill_s else None,
            decode_tokens_per_s=steps / (now - self._first) if steps else None,
            hit_ratio=phase.hit_ratio,
            bytes_read=counters.bytes_read - self._before.bytes_read,
            bytes_read_per_token=phase.bytes_read / max(steps, 1),
            peak_rss_bytes=peak_rss_bytes(),
            budget_bytes=self._engine.budget.total,
            precision=str(self._engine.precision),
            mean_width=phase.mean_width,
            seed=self._seed,
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _join(pieces: Iterator[Piece]) -> Completion:
    text, ids = "", []
    for piece in pieces:
        text += piece.text
        ids += piece.token_ids
    assert piece.finish_reason is not None
    return Completion(text, ids, piece.finish_reason, piece.stats)
