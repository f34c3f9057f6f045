"""The KV cache divided among sequences: those that are computed, and those that ended and are kept for their prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from moert.models.architecture import Architecture
from moert.models.kv_cache import KVCache, KVMemory
from moert.quant.format import KEY_BLOCK, align


@dataclass(eq=False, slots=True)
class SequenceCache:
    """A sequence's part of the memory: `size` positions, a multiple of a block, from position `start` on.

    tokens: those in it. running: whether it is computed; else it is kept, until somebody needs the room. used: grows
    with every use, so that the one with the least was not used for longest.
    """

    start: int
    size: int
    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    running: bool = True
    used: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


class StepInput(NamedTuple):
    """Tokens that a sequence computes in a step, behind those in its cache."""

    cache: SequenceCache
    tokens: list[int]


class SequenceCaches:
    """All sequences in one memory. Not safe to call from two threads."""

    def __init__(self, arch: Architecture, memory: KVMemory) -> None:
        self._arch, self._memory = arch, memory
        self._all: list[SequenceCache] = []  # by start
        self._clock = count(1)

    @property
    def positions(self) -> int:
        """How many the memory has, for all sequences together."""
        return self._memory.positions

    def __contains__(self, sequence: object) -> bool:
        """Whether it is still there."""
        return sequence in self._all

    def open(self, ids: Sequence[int], capacity: int) -> SequenceCache | None:
        """A sequence for up to `capacity` tokens that begins with as many of `ids` but the last as another one has.

        Where that one was kept only for what the two share, or must make room, its part is taken over; else its keys
        and values are copied. Of those that are kept, the least recently used make room. None where those that are
        computed leave none: then nothing has changed.
        """
        size = align(capacity, KEY_BLOCK)
        if self._gap(size, [s for s in self._all if s.running]) is None:
            return None
        shared, best = 0, None
        for sequence in self._all:
            length = common_prefix(sequence.tokens, ids[:-1])
            if length > shared or (length == shared and best is not None and best.running and not sequence.running):
                shared, best = length, sequence
        if not shared or best is None:
            return self._add(self._make_room(size), size, capacity, [])
        best.used = next(self._clock)
        tokens = best.tokens[:shared]
        if best.running or (len(best.tokens) - shared >= KEY_BLOCK and self._gap(size) is not None):
            start = self._make_room(size)
            self._memory.copy((best.start, best.size), (start, size), shared)
        elif best.size >= size:
            self._all.remove(best)
            start, size = best.start, best.size
        else:
            self._all.remove(best)
            start = self._make_room(size)
            self._memory.copy((best.start, best.size), (start, size), shared)
        return self._add(start, size, capacity, tokens)

    def close(self, sequence: SequenceCache) -> None:
        """Keep a sequence that is not computed any more for those that begin alike."""
        sequence.running, sequence.used = False, next(self._clock)
        if not sequence.tokens:
            self._all.remove(sequence)

    def clear(self) -> None:
        """Forget those that are kept."""
        self._all = [s for s in self._all if s.running]

    def _add(self, start: int, size: int, capacity: int, tokens: list[int]) -> SequenceCache:
        sequence = SequenceCache(start, size, self._cache(start, size, capacity), tokens, used=next(self._clock))
        sequence.cache.advance(len(tokens))
        self._all = sorted([*self._all, sequence], key=lambda s: s.start)
        return sequence

    def _cache(self, start: int, size: int, capacity: int) -> KVCache:
        cache = KVCache(self._arch, size, self._memory.dtype, self._memory, start)
        cache.ctx_size = capacity
        return cache

    def _gap(self, size: int, taken: Sequence[SequenceCache] | None = None) -> int | None:
        """Where `size` positions begin that none of `taken`, else of all, has."""
        start = 0
        for sequence in self._all if taken is None else taken:
            if sequence.start - start >= size:
                return start
            start = sequence.end
        return start if self._memory.positions - start >= size else None

    def _make_room(self, size: int) -> int:
        """Where so many positions are free, once those that are kept have given up what they need not have."""
        yielding: list[Callable[[], None]] = [self._shrink]
        for sequence in sorted((s for s in self._all if not s.running), key=lambda s: s.used):
            yielding.append(lambda sequence=sequence: self._all.remove(sequence))  # type: ignore[misc]
        while (start := self._gap(size)) is None:
            yielding.pop(0)()
        return start

    def _shrink(self) -> None:
        """Let those that are kept have no more than they use."""
        for sequence in (s for s in self._all if not s.running):
            size = align(len(sequence.tokens), KEY_BLOCK)
            if size < sequence.size:
                start, used = sequence.start, len(sequence.tokens)
                self._memory.copy((start, sequence.size), (start, size), used)
                sequence.size, sequence.cache = size, self._cache(start, size, size)
                sequence.cache.advance(used)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
