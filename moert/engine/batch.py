"""Several prompts at once, with continuous batching: one that ends makes room for the next at once.

A step takes one token of each of the sequences that the token scheduler names, and in the same pass as much of prompts
not yet read as a chunk holds: weights are read once for all of them.
"""

# V vocabulary

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from moert.config import PREFILL_CHUNK
from moert.engine.model_runner import Engine
from moert.engine.sampling import ResolvedParams
from moert.engine.sequence import Answer, Chunk
from moert.engine.sequence_cache import Slot, Slots
from moert.engine.statistics import SharedRequestTimer
from moert.errors import MoertError
from moert.scheduler.batching import POLICIES, Candidate
from moert.text.tokenizer import Tokenizer

MOST_DELAY = 4  # steps that a sequence may be left out


class _Request:
    """A prompt on its way. slot: its part of the KV cache, once it has one. waited: steps without it since its last."""

    slot: Slot
    waited = 0

    def __init__(
        self, index: int, ids: list[int], params: ResolvedParams, engine: Engine, tokenizer: Tokenizer
    ) -> None:
        self.index, self.ids = index, ids
        self.answer = Answer(params, tokenizer)
        self.meter = SharedRequestTimer(engine, self.answer.seed, len(ids))
        self.size = min(len(ids) + params.max_tokens - 1, engine.ctx_size)

    @property
    def decoding(self) -> bool:
        """Whether its prompt is read."""
        return self.answer.count > 0

    def next(self) -> list[int]:
        """What it would compute in the next step."""
        done = len(self.slot.tokens)
        return [self.answer.latest] if self.decoding else self.ids[done : done + PREFILL_CHUNK]

    def piece(self, text: str, finish: str | None, error: MoertError | None = None) -> tuple[int, Chunk]:
        stats = self.meter.stats(self.answer.count)
        return self.index, Chunk(text, self.answer.unsaid(), finish, stats, error)


def run(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[list[int], ResolvedParams]],
    say: Callable[[str], None],
) -> Iterator[tuple[int, Chunk]]:
    """Pieces of the answers to token ids that fit the context each, as they come, with the index of the request.

    Each answer is the one that its request gets alone. Where a step fails, its requests are tried alone, and those that
    fail again end with an error.
    """
    slots, choose = engine.slots(), POLICIES[engine.token_scheduler]
    waiting = deque(_Request(i, ids, params, engine, tokenizer) for i, (ids, params) in enumerate(requests))
    alive: list[_Request] = []
    first = True
    while waiting or alive:
        while waiting and (slot := slots.open(waiting[0].size)) is not None:
            alive.append(request := waiting.popleft())
            request.slot = slot
            request.meter.begin()
        if first:
            together = min(len(alive), engine.batch_size)
            say(f"{len(requests)} prompts, {together} at a time (KV cache of {slots.positions} positions)")
            first = False
        decoding = [r for r in alive if r.decoding]
        chosen = list(range(len(decoding)))
        if len(decoding) > engine.batch_size:
            candidates = [Candidate(r.waited, _mask(r.slot, engine.decoder.arch.num_experts)) for r in decoding]
            chosen = choose(candidates, engine.batch_size, MOST_DELAY)
        for i, request in enumerate(decoding):
            request.waited = 0 if i in chosen else request.waited + 1
        parts = [*_chunks(alive, min(PREFILL_CHUNK, engine.ctx_size)), *(decoding[i] for i in chosen)]
        for request, logits in _step(engine, slots, parts):
            if len(request.slot.tokens) < len(request.ids) and not isinstance(logits, MoertError):
                continue
            text, finish, error = _take(request, logits, engine.ctx_size)
            if finish:
                slots.close(request.slot)
                alive.remove(request)
            if text or finish:
                yield request.piece(text, finish, error)


def _chunks(alive: Sequence[_Request], room: int) -> list[_Request]:
    """Those whose prompts' next chunks fit a step together, at least the first."""
    found: list[_Request] = []
    for request in (r for r in alive if not r.decoding):
        room -= len(request.next())
        if found and room < 0:
            break
        found.append(request)
    return found


def _step(engine: Engine, slots: Slots, parts: Sequence[_Request]) -> list[tuple[_Request, Tensor | MoertError]]:
    """Compute what is next of each: logits [V] of its last token, or why there are none."""
    before = engine.counters.copy()
    work = [(request.slot, request.next()) for request in parts]
    count = sum(len(tokens) for _, tokens in work)
    try:
        with engine.counted(parts[0].decoding, count):
            rows = slots.step(work)
    except MoertError as error:
        if len(parts) == 1:
            return [(parts[0], error)]
        return [found for request in parts for found in _step(engine, slots, [request])]
    counted = engine.counters.since(before)
    for request, (_, tokens) in zip(parts, work, strict=True):
        request.meter.add(counted, len(tokens) / count, request.decoding)
    return list(zip(parts, rows, strict=True))


def _take(request: _Request, logits: Tensor | MoertError, ctx_size: int) -> tuple[str, str | None, MoertError | None]:
    """The next text, the reason to end, if any, and the error that this is."""
    if isinstance(logits, MoertError):
        return "", "error", logits
    if not request.decoding:
        request.meter.prefilled()
    try:
        return *request.answer.take(logits, request.slot.tokens, ctx_size), None
    except MoertError as error:
        return "", "error", error


def _mask(slot: Slot, num_experts: int) -> int:
    """The experts of a sequence's last token, a bit for each of each layer."""
    if slot.route is None:
        return 0
    return sum(1 << (layer * num_experts + expert) for layer, row in enumerate(slot.route.tolist()) for expert in row)
