"""The KV cache divided among several sequences, and the step that they take together."""

# T tokens, V vocabulary, R sequences, L layers with experts, K experts per token

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moert.models.decoder import Decoder
from moert.models.kv_cache import KVCache, KVMemory
from moert.quant.format import KEY_BLOCK, align


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence's part of the KV cache, from position `start` of the memory on.

    tokens: those in it. route: the experts of the last of them, int64 [L, K], where they are known.
    """

    start: int
    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    route: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + align(self.cache.ctx_size, KEY_BLOCK)


class Slots:
    """Sequences in one memory, at most `most` at a time. Not safe to call from two threads."""

    def __init__(self, decoder: Decoder, memory: KVMemory, most: int, most_together: float) -> None:
        self._decoder, self._memory, self._most, self._most_together = decoder, memory, most, most_together
        self._open: list[Slot] = []  # by start

    @property
    def positions(self) -> int:
        """Of the memory, for all sequences together."""
        return self._memory.positions

    def open(self, size: int) -> Slot | None:
        """A part for a sequence of up to `size` tokens; None where there is no room for it now."""
        needed, start = align(size, KEY_BLOCK), 0
        if len(self._open) == self._most:
            return None
        for index, behind in enumerate([*self._open, None]):
            if (behind.start if behind else self._memory.positions) - start >= needed:
                cache = KVCache(self._decoder.arch, size, self._memory.dtype, self._memory, start)
                self._open.insert(index, slot := Slot(start, cache))
                return slot
            start = behind.end if behind else 0
        return None

    def close(self, slot: Slot) -> None:
        """Make room for another sequence."""
        self._open.remove(slot)

    def step(self, parts: Sequence[tuple[Slot, Sequence[int]]]) -> Tensor:
        """Run tokens of each sequence behind those already there: float32 logits [R, V], of the last token of each.

        They are, to the byte, those that each sequence would get alone. An error or Ctrl-C leaves all sequences as they
        were.
        """
        for slot, _ in parts:
            slot.cache.truncate(len(slot.tokens))
        runs = [(torch.tensor(tokens), slot.cache) for slot, tokens in parts]
        step = self._decoder.together(runs, self._most_together)
        for (slot, tokens), route in zip(parts, step.routes, strict=True):
            slot.tokens += tokens
            slot.route = route
        return step.logits
