"""The expert arena: preallocated slots in the memory of host or device, so that it cannot grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moert.hardware.allocator import allocate
from moert.scheduler.types import SliceKey


class Arena:
    """Slots of each slice size in one block, which in host memory is aligned for O_DIRECT and costs pages once written.

    slots[i]: number of slots for slices of index i, each sizes[i] bytes (a multiple of 4096). memory: uint8
    [total_bytes], made by `allocate`. A slot belongs to whom `_owner` says; everything else follows from it, so that
    `take` and `release` may break off anywhere and be done again.
    """

    def __init__(
        self, slots: Sequence[int], sizes: Sequence[int], allocate: Callable[[int], Tensor] = allocate
    ) -> None:
        self.slots = tuple(slots)
        self.sizes = tuple(sizes)
        self.total_bytes = sum(n * size for n, size in zip(slots, sizes, strict=True))
        self.memory = allocate(self.total_bytes)
        self._starts: list[int] = []
        at = 0
        for n, size in zip(slots, sizes, strict=True):
            self._starts.append(at)
            at += n * size
        self._owner: list[list[SliceKey | None]] = [[None] * n for n in slots]
        self._free = [list(range(n - 1, -1, -1)) for n in slots]  # all free slots, and perhaps some that are taken
        self._slot_of: dict[SliceKey, int] = {}  # all slices with a slot, and perhaps some without

    def take(self, key: SliceKey) -> int:
        """Give a free slot to `key`, unless it has one; returns its offset. Raises IndexError where none is free."""
        index = key[2]
        owner, free = self._owner[index], self._free[index]
        slot = self._slot_of.get(key, -1)
        if slot < 0 or owner[slot] != key:
            while owner[free[-1]] is not None:
                free.pop()
            self._slot_of[key] = slot = free[-1]
            owner[slot] = key
            free.pop()
        return self._starts[index] + slot * self.sizes[index]

    def release(self, key: SliceKey) -> None:
        """Take the slot of `key` back, if it has one."""
        owner, slot = self._owner[key[2]], self._slot_of.get(key, -1)
        if slot >= 0 and owner[slot] == key:
            self._free[key[2]].append(slot)  # first: so it cannot be lost
            owner[slot] = None
        self._slot_of.pop(key, None)

    def held(self) -> set[SliceKey]:
        """Return all slices that have a slot."""
        return {key for owner in self._owner for key in owner if key is not None}

    def offset(self, key: SliceKey) -> int:
        """Return where the slot of `key` begins in `memory`, valid until it is released."""
        return self._starts[key[2]] + self._slot_of[key] * self.sizes[key[2]]

    def offsets(self, layer: int, expert: int, count: int) -> list[int]:
        """Return where the slots of the first `count` slices of an expert begin."""
        slot_of, places = self._slot_of, zip(range(count), self._starts, self.sizes, strict=False)
        return [start + slot_of[layer, expert, index] * size for index, start, size in places]  # type: ignore[index]
