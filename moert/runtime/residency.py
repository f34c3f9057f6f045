"""The expert arena: preallocated slots in host memory, so that it cannot grow."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from moert.memory import allocate
from moert.scheduler.types import SliceKey
from moert.store.fileio import as_bytes


def slots_for(
    arena_bytes: int, sizes: Sequence[int], experts: Sequence[int], shares: Sequence[float]
) -> tuple[int, ...]:
    """Slots per slice index for as many experts as fit, whichever they are: those used most have most slices.

    sizes[i]: bytes of slices of index i. experts[i]: how many experts use one, not ascending. shares[i]: of the uses of
    an expert, the share that needs slices of index i.
    """

    def slots(n: int) -> tuple[int, ...]:
        return tuple(min(math.ceil(n * share), count) for share, count in zip_longest(shares, experts, fillvalue=0))

    def nbytes(n: int) -> int:
        return sum(count * size for count, size in zip(slots(n), sizes, strict=True))

    most = math.ceil(experts[0] / min(share for share in shares if share))
    return slots(bisect_right(range(1, most + 1), arena_bytes, key=nbytes))


class Arena:
    """Slots of each slice size in one anonymous mapping, aligned for O_DIRECT. Pages cost memory once written.

    slots[i]: number of slots for slices of index i, each sizes[i] bytes (a multiple of 4096).
    """

    def __init__(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self.sizes = tuple(sizes)
        self.total_bytes = sum(n * size for n, size in zip(slots, sizes, strict=True))
        self._tensor = allocate(self.total_bytes)
        self._bytes = as_bytes(self._tensor)
        self._starts: list[int] = []
        at = 0
        for n, size in zip(slots, sizes, strict=True):
            self._starts.append(at)
            at += n * size
        self._free = [list(range(n - 1, -1, -1)) for n in slots]
        self._slot_of: dict[SliceKey, int] = {}

    def take(self, key: SliceKey) -> memoryview:
        """Give a free slot to `key`, to read into. Raises IndexError where none is free: the cache counts slots too."""
        self._slot_of[key] = self._free[key.slice].pop()
        return self.buffer(key)

    def release(self, key: SliceKey) -> None:
        self._free[key.slice].append(self._slot_of.pop(key))

    def rebuild(self) -> None:
        """Work out anew which slots are free, after a `take` or `release` may have been interrupted."""
        used = [{slot for key, slot in self._slot_of.items() if key.slice == index} for index in range(len(self.slots))]
        self._free = [
            [n for n in range(count - 1, -1, -1) if n not in taken]
            for count, taken in zip(self.slots, used, strict=True)
        ]

    def held(self) -> set[SliceKey]:
        """All slices that have a slot."""
        return set(self._slot_of)

    def _at(self, key: SliceKey) -> int:
        return self._starts[key.slice] + self._slot_of[key] * self.sizes[key.slice]

    def buffer(self, key: SliceKey) -> memoryview:
        """The slot of `key`, to read into."""
        at = self._at(key)
        return self._bytes[at : at + self.sizes[key.slice]]

    def view(self, key: SliceKey) -> Tensor:
        """The slot of `key`, to compute with: uint8 [sizes[key.slice]], valid until it is released."""
        at = self._at(key)
        return self._tensor[at : at + self.sizes[key.slice]]
