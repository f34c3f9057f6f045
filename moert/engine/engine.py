"""The loop that all generating goes through: requests in, steps of the model, chunks of answers out.

Has no thread of its own and is called from one at a time: see `worker`. Knows no tasks, queues or callers.
"""

# V vocabulary

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from moert.config import PREFILL_CHUNK
from moert.engine.sequence import Chunk, Request, Sequence
from moert.engine.sequence_cache import SequenceCaches, StepInput
from moert.engine.statistics import Measured, StepLedger
from moert.errors import MoertError
from moert.scheduler.batching import admissions, choose
from moert.text.tokenizer import Tokenizer


class Runner(Measured, Protocol):
    """The model as the engine needs it; see `ModelRunner`."""

    @property
    def ctx_size(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def caches(self) -> SequenceCaches: ...
    def step(self, inputs: list[StepInput], decoding: bool) -> Tensor: ...


class Output(NamedTuple):
    """A piece of the answer to a request."""

    request_id: int
    chunk: Chunk


class Engine:
    """Runs requests together, each to the text that it gets alone (unless the precision is elastic).

    Up to `runner.batch_size` are decoded in a step, and beside them prompts are read in chunks; `scheduler.batching`
    says who takes part. Where a step fails, its requests are tried alone, and those that fail again end with an error.
    interval: seconds between two pieces of an answer at least: to hand over each of thousands of tokens a second would
    slow them down.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, interval: float = 0.0) -> None:
        self._runner, self._tokenizer, self._interval = runner, tokenizer, interval
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._ids = itertools.count()
        self._ledger = StepLedger(lambda: runner.counters)

    def add_request(self, request: Request) -> int:
        """Let a request wait for its turn; returns the id that its outputs have. Its prompt must fit the context."""
        sequence = Sequence(next(self._ids), request, self._runner, self._tokenizer, self._runner.ctx_size)
        self._waiting.append(sequence)
        return sequence.number

    def abort(self, request_id: int) -> None:
        """End a request without any further output; nothing happens where it has ended."""
        for sequence in [*self._waiting, *self._running]:
            if sequence.number == request_id:
                self._remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._running or self._waiting)

    def step(self) -> list[Output]:
        """Run the model once for those whose turn it is; returns what came of it."""
        expired = self._expire()
        return expired + self._postprocess(self._run(self._schedule()))

    def fail(self, error: MoertError) -> list[Output]:
        """End all requests with this error."""
        return [self._end(sequence, "error", error) for sequence in [*self._running, *self._waiting]]

    def _schedule(self) -> list[Sequence]:
        runner = self._runner
        waiting, running = ([s.candidate() for s in queue] for queue in (self._waiting, self._running))
        admitted = []
        for index in admissions(waiting, running, runner.batch_size):
            sequence = self._waiting[index]
            cache = runner.caches.open(sequence.prompt_ids, sequence.capacity)
            if cache is None:
                break
            sequence.begin(cache)
            admitted.append(sequence)
        if admitted:
            self._running += admitted
            self._waiting = [s for s in self._waiting if s not in admitted]
            running = [s.candidate() for s in self._running]
        chosen = choose(running, runner.batch_size, min(PREFILL_CHUNK, runner.ctx_size))
        for sequence in itertools.chain(self._waiting, self._running):
            sequence.waited += 1
        for index in chosen:
            self._running[index].waited = 0
        return [self._running[index] for index in chosen]

    def _run(self, chosen: list[Sequence]) -> list[tuple[Sequence, Tensor | MoertError]]:
        """Compute what is next of each: logits [V] of its last token, or why there are none."""
        if not chosen:
            return []
        inputs = [StepInput(s.cache, s.next()) for s in chosen]
        count = sum(len(tokens) for _, tokens in inputs)
        shares = [(s.timer, len(p.tokens) / count, s.decoding) for s, p in zip(chosen, inputs, strict=True)]
        self._ledger.begin(shares)
        try:
            rows = self._runner.step(inputs, chosen[0].decoding)
        except MoertError as error:
            if len(chosen) == 1:
                return [(chosen[0], error)]
            return [found for sequence in chosen for found in self._run([sequence])]
        return list(zip(chosen, rows, strict=True))

    def _postprocess(self, results: Iterable[tuple[Sequence, Tensor | MoertError]]) -> list[Output]:
        outputs = []
        for sequence, logits in results:
            if isinstance(logits, MoertError):
                outputs.append(self._end(sequence, "error", logits))
                continue
            if len(sequence.cache.tokens) < len(sequence.prompt_ids):
                continue
            if not sequence.decoding:
                sequence.timer.prefilled()
            try:
                finish = sequence.take(logits)
            except MoertError as error:
                outputs.append(self._end(sequence, "error", error))
                continue
            if finish:
                outputs.append(self._end(sequence, finish))
            elif sequence.request.stream and sequence.has_news(self._interval):
                self._ledger.settle()
                outputs.append(Output(sequence.number, sequence.chunk(None)))
        return outputs

    def _expire(self) -> list[Output]:
        """End those whose deadline is over."""
        late = [s for s in [*self._running, *self._waiting] if s.request.deadline is not None]
        now = time.monotonic() if late else 0.0
        error = MoertError("The answer was not complete when its deadline was over; allow it more time.")
        return [self._end(s, "error", error) for s in late if s.request.deadline <= now]  # type: ignore[operator]

    def _end(self, sequence: Sequence, finish: str, error: MoertError | None = None) -> Output:
        self._ledger.settle()
        output = Output(sequence.number, sequence.chunk(finish, error))
        self._remove(sequence)
        return output

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._runner.caches.close(sequence.cache)
        if not self._running:
            self._ledger.begin([])
