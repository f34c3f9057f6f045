"""The expert arena: preallocated slots in the memory of host or device, so that it cannot grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moert.hardware.allocator import allocate
from moert.scheduler.types import SliceKey


class Arena:
    """Slots of each slice size in one block, which in host memory is aligned for O_DIRECT and costs pages once written.

    slots[i]: number of slots for slices of index i, each sizes[i] bytes (a multiple of 4096). memory: uint8
    [total_bytes], made by `allocate`.
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
        self._free = [list(range(n - 1, -1, -1)) for n in slots]
        self._slot_of: dict[SliceKey, int] = {}

    def take(self, key: SliceKey) -> int:
        """Give a free slot to `key`; returns its offset. Raises IndexError where none is free."""
        self._slot_of[key] = self._free[key[2]].pop()
        return self.offset(key)

    def release(self, key: SliceKey) -> None:
        self._free[key[2]].append(self._slot_of.pop(key))

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

    def offset(self, key: SliceKey) -> int:
        """Where the slot of `key` begins in `memory`, valid until it is released."""
        return self._starts[key[2]] + self._slot_of[key] * self.sizes[key[2]]

    def offsets(self, layer: int, expert: int, count: int) -> list[int]:
        """The same of the first `count` slices of an expert."""
        slot_of, places = self._slot_of, zip(range(count), self._starts, self.sizes, strict=False)
        return [start + slot_of[layer, expert, index] * size for index, start, size in places]  # type: ignore[index]
