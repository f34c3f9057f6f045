"""Keeps account of which slices have room: absent, in flight, resident or in use.

The room is fixed: so much per slice index, over all layers. What is resident of an expert is always a prefix of its
slices, since a refinement is useless without its base; so a base outlives its refinements. `eviction` says which
policies decide what goes first when room is needed.

This is the one state that decisions are made on, plain data in one place. It changes only by whole steps: a `Change` is
worked out on the side, without touching anything, and `commit` makes it so. A commit that is interrupted is finished by
whoever comes next, so that the state is never half of one thing and half of another. Where slots and reads follow the
state, `orders` holds what they have yet to do.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from moert.scheduler.eviction import CachePolicy, LeastRecentlyUsed
from moert.scheduler.types import ExpertKey, Load, SliceKey

_Value = TypeVar("_Value", int, tuple[Load, ...])


@dataclass(slots=True)
class Orders:
    """Holds what was decided and is not done yet; who does it takes it off.

    leaving: slices that lost their room, whose bytes are still where they were. coming: reads to begin, and whether
    nobody waits for them.
    """

    leaving: dict[SliceKey, None] = field(default_factory=dict)
    coming: dict[Load, bool] = field(default_factory=dict)


class SliceCache:
    """Book-keeping of the room, and of what is on its way into it.

    capacity[i]: the room for slices of index i. sizes[layer][i]: how much of it such a slice takes; without it each
    takes 1, so that the capacity is a number of slots. in_use: experts that nothing may evict now. ahead: the loads in
    flight that nobody waited for when they began, with what they take. Raises ValueError for negative numbers.
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
        self.in_use: Collection[tuple[int, int]] = frozenset()
        self.in_flight: dict[ExpertKey, tuple[Load, ...]] = {}
        self.ahead: dict[Load, int] = {}
        self.orders: Orders | None = None
        self._sizes = sizes
        self._ones = (1,) * len(self.capacity)
        self._resident: dict[ExpertKey, int] = {}
        self._unfinished: Change | None = None  # committed, and perhaps not wholly carried out

    def sizes(self, layer: int) -> Sequence[int]:
        """Return the room that a slice of each index takes in a layer."""
        return self._ones if self._sizes is None else self._sizes[layer]

    def nbytes(self, load: Load) -> int:
        """Return the room that the slices of a load take."""
        return sum(self.sizes(load.layer)[load.first : load.last])

    def resident(self, layer: int, expert: int) -> int:
        """Return how many slices of an expert are in memory, or on their way."""
        return self._resident.get((layer, expert), 0)  # type: ignore[call-overload, no-any-return]

    def there(self, layer: int, expert: int, without: Load | None = None) -> int:
        """Return how many slices of an expert are there, not in flight any more. without: a load that has ended."""
        count = self.resident(layer, expert)
        for load in self.in_flight.get((layer, expert), ()):  # type: ignore[call-overload]
            if load.first < count and load != without:
                count = load.first
        return count

    def resident_experts(self) -> dict[ExpertKey, int]:
        """Return all experts with a slice in memory, and how many slices."""
        return dict(self._resident)

    def room(self, keep: Collection[tuple[int, int]]) -> list[int]:
        """Return the room per slice index that is free or can be freed without touching the experts in `keep`."""
        room = list(self.capacity)
        for key in keep:
            sizes = self.sizes(key[0])
            for index in range(self.resident(*key)):
                room[index] -= sizes[index]
        return room

    def insert(
        self, key: ExpertKey, last: int, keep: Container[tuple[int, int]] = (), reuse_score: float | None = None
    ) -> list[SliceKey] | None:
        """Give room at once to slices of `key`, as `Change.insert`; returns what had to be evicted, None for nothing
        done.
        """
        change = self.draft()
        if not change.insert(key, last, keep, reuse_score):
            return None
        self.commit(change)
        return change.evicted

    def shrink(self, key: ExpertKey, to: int) -> list[SliceKey]:
        """Take away the slices of `key` from index `to` on (0: all); returns them, highest first."""
        change = self.draft()
        change.shrink(key, to)
        self.commit(change)
        return change.evicted

    def arrived(self, load: Load) -> None:
        """A load is not in flight any more: its slices are there."""
        self.finish()
        key = ExpertKey(load.layer, load.expert)
        rest = tuple([other for other in self.in_flight.get(key, ()) if other != load])
        if rest:
            self.in_flight[key] = rest
        else:
            self.in_flight.pop(key, None)
        self.ahead.pop(load, None)
        if self.orders is not None:
            self.orders.coming.pop(load, None)

    def cancel(self, load: Load) -> None:
        """A load in flight will not be read: its room, and that of slices behind it, is free again."""
        key = ExpertKey(load.layer, load.expert)
        if load in self.in_flight.get(key, ()):
            self.shrink(key, load.first)

    def draft(self) -> Change:
        """Begin a change of the state as it is now; nothing happens before `commit`."""
        self.finish()
        return Change(self)

    def commit(self, change: Change) -> None:
        """Make it so. The assignment decides: behind it all of the change has happened, before it nothing."""
        self._unfinished = change
        self.finish()

    def finish(self) -> None:
        """Carry out what is committed. Whatever part of it was done before may be done again."""
        change = self._unfinished
        if change is None:
            return
        policy = self.policy
        for key in change.evicted:
            policy.removed(ExpertKey(key.layer, key.expert), key.slice)
        for owner, index in change.inserted:
            policy.loaded(owner, index)
        _update(self._resident, change.resident)
        _update(self.in_flight, change.in_flight)
        self.ahead.update({load: self.nbytes(load) for load, ahead in change.loads.items() if ahead})
        for load in change.ended:
            self.ahead.pop(load, None)
        orders = self.orders
        if orders is not None:
            for load in change.ended:
                orders.coming.pop(load, None)
            orders.leaving.update(dict.fromkeys(change.evicted))
            orders.coming.update(change.loads)
        self.free = change.free
        self._unfinished = None


class Change:
    """One step of a `SliceCache`, worked out without touching it.

    evicted: slices that lose their room. loads: what is to be read, and whether nobody waits for it. ended: loads that
    were in flight into what is evicted.
    """

    __slots__ = ("_cache", "ended", "evicted", "free", "in_flight", "inserted", "loads", "resident")

    def __init__(self, cache: SliceCache) -> None:
        self._cache = cache
        self.free = list(cache.free)
        self.resident: dict[ExpertKey, int] = {}  # of those that change
        self.in_flight: dict[ExpertKey, tuple[Load, ...]] = {}  # of those that change
        self.evicted: list[SliceKey] = []
        self.inserted: list[tuple[ExpertKey, int]] = []
        self.loads: dict[Load, bool] = {}
        self.ended: list[Load] = []

    def held(self, key: ExpertKey) -> int:
        """Return how many slices of an expert have room after this."""
        found = self.resident.get(key)
        return self._cache.resident(*key) if found is None else found

    def loading(self, key: ExpertKey) -> tuple[Load, ...]:
        """Return the loads of an expert that are in flight after this."""
        found = self.in_flight.get(key)
        return self._cache.in_flight.get(key, ()) if found is None else found

    @property
    def ahead(self) -> int:
        """Return how much is in flight after this that nobody waits for."""
        cache = self._cache
        ended = sum([cache.ahead.get(load, 0) for load in self.ended])
        return sum(cache.ahead.values()) - ended + sum([cache.nbytes(load) for load, a in self.loads.items() if a])

    def insert(
        self, key: ExpertKey, last: int, keep: Container[tuple[int, int]] = (), reuse_score: float | None = None
    ) -> bool:
        """Give room to the slices of `key` below `last` that have none.

        What is in use and experts in `keep` are not touched. Without `reuse_score` raises ValueError where that leaves
        too little room; with it, nothing is evicted that the policy holds to be worth as much: then nothing happens,
        and False is returned.
        """
        cache, changed, free_now = self._cache, self.resident, self.free
        first, sizes, policy, in_use = self.held(key), cache.sizes(key[0]), cache.policy, cache.in_use
        victims: dict[ExpertKey, int] = {}
        index = first

        def evictable(k: ExpertKey) -> bool:
            held = changed[k] if k in changed else cache.resident(*k)
            return held > index and k not in in_use and k not in keep and k not in victims and k != key

        for index in range(first, last):
            free = free_now[index]
            if free >= sizes[index]:
                continue
            if victims:
                free += sum(cache.sizes(k[0])[index] for k, to in victims.items() if to <= index < self.held(k))
            while free < sizes[index]:
                victim = policy.victim(index, evictable)
                if victim is None and reuse_score is None:
                    raise ValueError(f"no room for slice {index} of expert {key[1]} in layer {key[0]}")
                if victim is None or (reuse_score is not None and policy.reuse_score(victim, index) >= reuse_score):
                    return False
                victims[victim] = index
                free += cache.sizes(victim[0])[index]
        for victim, to in victims.items():
            self.shrink(victim, to)
        for index in range(first, last):
            free_now[index] -= sizes[index]
            self.inserted.append((key, index))
        changed[key] = max(first, last)
        return True

    def shrink(self, key: ExpertKey, to: int) -> None:
        """Take away the slices of `key` from index `to` on (0: all)."""
        had, sizes = self.held(key), self._cache.sizes(key[0])
        if had <= to:
            return
        for index in range(had - 1, to - 1, -1):
            self.free[index] += sizes[index]
            self.evicted.append(SliceKey(*key, index))
        self.resident[key] = to
        if loads := self.loading(key):
            self.in_flight[key] = tuple([load for load in loads if load.first < to])
            self.ended += [load for load in loads if load.first >= to]

    def load(self, load: Load, ahead: bool = False) -> None:
        """Have slices read that were given room."""
        key = ExpertKey(load.layer, load.expert)
        self.in_flight[key] = (*self.loading(key), load)
        self.loads[load] = ahead


def _update(state: dict[ExpertKey, _Value], changed: Mapping[ExpertKey, _Value]) -> None:
    for key, value in changed.items():
        if value:
            state[key] = value
        else:
            state.pop(key, None)
