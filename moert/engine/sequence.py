"""Requests, and the sequences that they become: tokens to text, and reasons to end. Does not run the model."""

# V vocabulary

from __future__ import annotations

import math
import time
from collections import abc
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from moert.config import PREFILL_CHUNK
from moert.engine.sampling import ResolvedParams, Sampler, StopMatcher
from moert.engine.sequence_cache import SequenceCache
from moert.engine.statistics import GenerationStats, Measured, RequestTimer
from moert.errors import MoertError, UsageError
from moert.scheduler.batching import Candidate
from moert.text.tokenizer import Tokenizer

Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer as it is made. finish_reason is None until the last one: `stop` or `length`.

    Among several prompts it can be `error`: then `error` says why this one broke off.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stats: GenerationStats
    error: MoertError | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. finish_reason: `stop` (end token or stop string) or `length` (max_tokens or context full).

    Among several prompts it can be `error`: then `error` says why this one broke off, and the rest is what there was.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats
    error: MoertError | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how it is to be continued.

    priority: somebody waits for an interactive request; a batch request takes the turns that these leave. deadline: by
    `time.monotonic`; an answer that has not ended then ends with an error. stream: whether each piece of the answer is
    wanted as it is made; else it comes whole. came: when it was asked for, by `time.perf_counter`.
    """

    prompt_ids: abc.Sequence[int]
    params: ResolvedParams
    priority: Priority = "interactive"
    deadline: float | None = None
    stream: bool = True
    came: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.priority not in get_args(Priority):
            raise UsageError(f"There is no priority {self.priority!r}; there are {', '.join(get_args(Priority))}.")


class Sequence:
    """A request on its way: its tokens, its text and what is held back of it, its part of the KV cache, its figures.

    waited: steps without it since it came or took part in one.
    """

    cache: SequenceCache

    def __init__(self, number: int, request: Request, runner: Measured, tokenizer: Tokenizer, ctx_size: int) -> None:
        params = request.params
        self.number, self.request, self.prompt_ids = number, request, list(request.prompt_ids)
        self.capacity = min(len(self.prompt_ids) + params.max_tokens - 1, ctx_size)
        self.waited = 0
        self._sampler, self._eos_ids, self._ctx_size = Sampler(params), tokenizer.eos_ids, ctx_size
        self._detokenizer, self._matcher = tokenizer.detokenizer(), StopMatcher(params.stop)
        self._text, self._new, self._latest = "", list[int](), -1
        self.count = 0  # tokens of the answer
        self._told = -math.inf  # when the last chunk was made
        self.timer = RequestTimer(runner, self._sampler.seed, len(self.prompt_ids), request.came)

    def begin(self, cache: SequenceCache) -> None:
        """Take its part of the KV cache, which may hold the beginning of the prompt."""
        self.cache = cache
        self.timer.begin(len(cache.tokens))

    @property
    def decoding(self) -> bool:
        """Whether its prompt is read."""
        return self.count > 0

    def candidate(self) -> Candidate:
        """Itself, as the scheduler sees it; before it begins, its prompt counts as a token."""
        left = 0
        if not self.decoding:
            done = len(self.cache.tokens) if hasattr(self, "cache") else 0
            left = min(len(self.prompt_ids) - done, PREFILL_CHUNK)
        return Candidate(self.request.priority == "interactive", self.number, self.waited, left)

    def next(self) -> list[int]:
        """The tokens that it computes in its next step."""
        done = len(self.cache.tokens)
        return [self._latest] if self.decoding else self.prompt_ids[done : done + PREFILL_CHUNK]

    def take(self, logits: Tensor) -> str | None:
        """Draw the next token from logits [V]; return the reason to end, if there is one."""
        params, history = self.request.params, self.cache.tokens
        self._latest = token = self._sampler(logits, history)
        self.count += 1
        self._new.append(token)
        ended = token in self._eos_ids and not params.ignore_eos
        if not ended:
            self._text += self._matcher.push(self._detokenizer.push(token))
        full = self.count >= params.max_tokens or len(history) + 1 > self._ctx_size
        stop = ended or self._matcher.stopped
        if not stop and not full:
            return None
        if not self._matcher.stopped:
            self._text += self._matcher.push(self._detokenizer.flush())
            self._text += self._matcher.flush()
            stop = stop or self._matcher.stopped
        return "stop" if stop else "length"

    def has_news(self, interval: float) -> bool:
        """Whether there is text that no chunk had yet, and the last chunk is so many seconds ago."""
        return bool(self._text) and time.perf_counter() - self._told >= interval

    def chunk(self, finish: str | None, error: MoertError | None = None) -> Chunk:
        """What is new since the last chunk."""
        text, new = self._text, self._new
        self._text, self._new, self._told = "", [], time.perf_counter()
        return Chunk(text, new, finish, self.timer.stats(self.count), error)


def join(chunks: abc.Iterable[Chunk]) -> Completion:
    """The whole answer that chunks make."""
    text, ids = "", list[int]()
    for chunk in chunks:
        text += chunk.text
        ids += chunk.token_ids
    assert chunk.finish_reason is not None
    return Completion(text, ids, chunk.finish_reason, chunk.stats, chunk.error)
