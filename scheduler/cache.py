"""The cache of slices: which of them are in memory.

The room is fixed: so much per slice index, over all layers. What is resident of an expert is always a prefix of its
slices, since a refinement is useless without its base; so a base outlives its refinements. `eviction` says which
policies decide what goes first when room is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence

from moert.scheduler.eviction import CachePolicy, LeastRecentlyUsed
from moert.scheduler.types import ExpertKey, SliceKey


class SliceCache:
    """Book-keeping of the room.

    capacity[i]: the room for slices of index i. sizes[layer][i]: how much of it such a slice takes; without it each
    takes 1, so that the capacity is a number of slots. Raises ValueError for negative numbers.
    """

    def __init__(
        self,
        capacity: Sequence[int],
        policy: CachePolicy | None = None,
        sizes: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        if not capacity or any(n < 0 for n in capacity):
            raise ValueError(f"capacity {list(capacity)}: one number per slice is needed, none negative")
        self.capacity = tuple(capacity)
        self.free = list(capacity)
        self.policy: CachePolicy = policy or LeastRecentlyUsed()
        self._sizes = sizes
        self._ones = (1,) * len(self.capacity)
        self._resident: dict[ExpertKey, int] = {}

    def sizes(self, layer: int) -> Sequence[int]:
        """Room that a slice of each index takes in a layer."""
        return self._ones if self._sizes is None else self._sizes[layer]

    def resident(self, layer: int, expert: int) -> int:
        """Return how many slices of an expert are in memory, or on their way."""
        return self._resident.get((layer, expert), 0)  # type: ignore[call-overload, no-any-return]

    def resident_experts(self) -> dict[ExpertKey, int]:
        """Return all experts with a slice in memory, and how many slices."""
        return dict(self._resident)

    def room(self, keep: Collection[tuple[int, int]]) -> list[int]:
        """Room per slice index that is free or can be freed without touching the experts in `keep`."""
        room = list(self.capacity)
        for key in keep:
            sizes = self.sizes(key[0])
            for index in range(self.resident(*key)):
                room[index] -= sizes[index]
        return room

    def insert(
        self, key: ExpertKey, last: int, keep: Container[tuple[int, int]], reuse_score: float | None = None
    ) -> list[SliceKey] | None:
        """Give room to the slices of `key` below `last` that have none; returns what had to be evicted.

        Experts in `keep` are not touched. Without `reuse_score` raises ValueError where that leaves too little room;
        with it, nothing is evicted that the policy holds to be worth as much: then nothing happens, and None is
        returned.
        """
        first, sizes = self._resident.get(key, 0), self.sizes(key[0])
        victims: dict[ExpertKey, int] = {}
        index = first

        def evictable(k: ExpertKey) -> bool:
            return self._resident.get(k, 0) > index and k not in keep and k not in victims and k != key

        for index in range(first, last):
            free = self.free[index]
            if free >= sizes[index]:
                continue
            if victims:
                free += sum(self.sizes(k[0])[index] for k, to in victims.items() if to <= index < self._resident[k])
            while free < sizes[index]:
                victim = self.policy.victim(index, evictable)
                if victim is None and reuse_score is None:
                    raise ValueError(f"no room for slice {index} of expert {key[1]} in layer {key[0]}")
                if victim is None or (
                    reuse_score is not None and self.policy.reuse_score(victim, index) >= reuse_score
                ):
                    return None
                victims[victim] = index
                free += self.sizes(victim[0])[index]
        evicted: list[SliceKey] = []
        for victim, to in victims.items():
            evicted += self.shrink(victim, to)
        for index in range(first, last):
            self.free[index] -= sizes[index]
            self.policy.loaded(key, index)
        self._resident[key] = max(first, last)
        return evicted

    def shrink(self, key: ExpertKey, to: int) -> list[SliceKey]:
        """Take away the slices of `key` from index `to` on (0: all); returns them, highest first."""
        had, sizes = self._resident.get(key, 0), self.sizes(key[0])
        lost = [SliceKey(*key, index) for index in range(had - 1, to - 1, -1)]
        for item in lost:
            self.free[item.slice] += sizes[item.slice]
            self.policy.removed(key, item.slice)
        if to == 0 and had:
            del self._resident[key]
        elif lost:
            self._resident[key] = to
        return lost
