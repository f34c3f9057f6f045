"""Which slices are in memory, and which go first when room is needed.

The slots are fixed: so many per slice index, over all layers. What is resident of an expert is always a prefix of its
slices, since a refinement is useless without its base.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from moert.scheduler.types import ExpertKey, RoutedExpert, SliceKey


class CachePolicy(Protocol):
    """Decides the order of eviction. Told of every use, so that it can keep scores."""

    name: str

    def used(self, layer: int, routed: Sequence[RoutedExpert]) -> None:
        """All experts that the tokens of one step are routed to in `layer`, resident or not."""

    def loaded(self, key: ExpertKey) -> None:
        """The first slice of an expert got a slot."""

    def removed(self, key: ExpertKey) -> None:
        """The last slice of an expert lost its slot."""

    def eviction_order(self) -> Iterable[ExpertKey]:
        """Resident experts, the one to evict first at the front."""


class LeastRecentlyUsed:
    """Evicts the expert whose last use is longest ago: the baseline of every published expert cache."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def used(self, layer: int, routed: Sequence[RoutedExpert]) -> None:
        for r in routed:
            key = (layer, r.expert)  # equal to an ExpertKey, and made ten times faster
            if key in self._order:
                self._order.move_to_end(key)  # type: ignore[arg-type]

    def loaded(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def removed(self, key: ExpertKey) -> None:
        del self._order[key]

    def eviction_order(self) -> Iterator[ExpertKey]:
        return iter(self._order)


POLICIES: dict[str, type[LeastRecentlyUsed]] = {"lru": LeastRecentlyUsed}


class SliceCache:
    """Book-keeping of the slots. slots[i]: how many slices of index i fit. Raises ValueError for negative numbers."""

    def __init__(self, slots: Sequence[int], policy: CachePolicy | None = None) -> None:
        if not slots or any(n < 0 for n in slots):
            raise ValueError(f"slots {list(slots)}: one number per slice is needed, none negative")
        self.slots = tuple(slots)
        self.free = list(slots)
        self.policy: CachePolicy = policy or LeastRecentlyUsed()
        self._resident: dict[ExpertKey, int] = {}

    def resident(self, layer: int, expert: int) -> int:
        """How many slices of an expert are in memory."""
        return self._resident.get((layer, expert), 0)  # type: ignore[call-overload, no-any-return]

    def resident_experts(self) -> dict[ExpertKey, int]:
        """All experts with a slice in memory, and how many slices."""
        return dict(self._resident)

    def room(self, keep: Collection[ExpertKey]) -> list[int]:
        """Slots per slice index that are free or can be freed without touching the experts in `keep`."""
        room = list(self.slots)
        for key in keep:
            for index in range(self._resident.get(key, 0)):
                room[index] -= 1
        return room

    def insert(self, key: ExpertKey, last: int, keep: Collection[ExpertKey]) -> list[SliceKey]:
        """Give slots to the slices of `key` below `last` that have none; returns what had to be evicted.

        Experts in `keep` are not touched. Raises ValueError where that leaves too little room.
        """
        first = self._resident.get(key, 0)
        evicted: list[SliceKey] = []
        for index in range(first, last):
            if self.free[index] == 0:
                candidates = (k for k in self.policy.eviction_order() if k not in keep and k != key)
                victim = next((k for k in candidates if self._resident[k] > index), None)
                if victim is None:
                    raise ValueError(f"no slot for slice {index} of expert {key.expert} in layer {key.layer}")
                evicted += self.shrink(victim, index)
            self.free[index] -= 1
            if index == 0:
                self.policy.loaded(key)
            self._resident[key] = index + 1
        return evicted

    def shrink(self, key: ExpertKey, to: int) -> list[SliceKey]:
        """Take away the slices of `key` from index `to` on (0: all); returns them, highest first."""
        had = self._resident.get(key, 0)
        lost = [SliceKey(*key, index) for index in range(had - 1, to - 1, -1)]
        for item in lost:
            self.free[item.slice] += 1
        if to == 0 and had:
            del self._resident[key]
            self.policy.removed(key)
        elif lost:
            self._resident[key] = to
        return lost
