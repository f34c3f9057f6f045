"""Turns what the router asks into a plan, and advances the cache to the state after that plan.

`Scheduler` is the one object that the runtime and the simulator both drive. It knows no clock, no file and no thread:
what it is told, in which order, decides what it says.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from moert.scheduler.cache import SliceCache
from moert.scheduler.elastic import ErrorBudget
from moert.scheduler.hebf import Order, hottest_bit_first, hottest_first
from moert.scheduler.types import ExpertKey, LayerPlan, Load, Prediction, Prefetch, RoutedExpert, SliceKey, Wave

_NOTHING: Mapping[ExpertKey, Load] = {}
_ALL = 1 << 30  # above any number of slices


def plan_layer(
    layer: int,
    routed: Sequence[RoutedExpert],
    cache: SliceCache,
    order: Order = hottest_bit_first,
    tokens: int = 1,
    in_flight: Mapping[ExpertKey, Load] = _NOTHING,
) -> LayerPlan:
    """Plan one layer of one step of `tokens` tokens; `cache` is advanced to the state in which the plan leaves it.

    Experts that are resident compute first. What is missing is loaded in waves, as many experts at a time as fit, each
    read once. underway: what is still being read of resident slices: the last ones. Deterministic. Raises
    ValueError for an expert without tokens or slices, and where the room cannot hold a single one of the experts.
    """
    check(layer, routed)
    cache.policy.used(layer, routed, tokens)
    return _plan(layer, routed, cache, order, in_flight)


def check(layer: int, routed: Sequence[RoutedExpert]) -> None:
    """Raises ValueError for an expert without tokens or slices."""
    if any(r.tokens < 1 or r.slices < 1 for r in routed):
        raise ValueError(f"layer {layer}: an expert with no tokens or no slices among {list(routed)}")


def _plan(
    layer: int,
    routed: Sequence[RoutedExpert],
    cache: SliceCache,
    order: Order,
    in_flight: Mapping[ExpertKey, Load],
) -> LayerPlan:
    ready: list[int] = []
    missing: list[RoutedExpert] = []
    awaited: list[int] = []
    for r in hottest_first(routed):
        there = cache.resident(layer, r.expert) >= r.slices
        if in_flight and _there(in_flight, layer, r.expert) < r.slices:
            awaited.append(r.expert)
            if there:
                continue
        if there:
            ready.append(r.expert)
        else:
            missing.append(r)
    slices = {r.expert: r.slices for r in routed}
    if not missing:  # most steps, so they do not pay for what follows
        return LayerPlan(layer, slices, (Wave((), (), tuple(ready), tuple(awaited)),))
    sizes, waves = cache.sizes(layer), []
    keep = {(layer, e) for e in [*ready, *awaited]}  # equal to ExpertKeys, and made much faster
    # Where all experts of the layer fit whatever else is there, which is usual for a single token, nobody need count.
    roomy = all(len(routed) * size <= most for size, most in zip(sizes, cache.capacity, strict=True))
    while missing or ready or awaited:
        chosen: list[RoutedExpert] = []
        if roomy:
            chosen = missing
        room = cache.room(keep) if not roomy else []
        for r in missing[len(chosen) :]:
            held = cache.resident(layer, r.expert) if (layer, r.expert) in keep else 0
            if any(room[index] < sizes[index] for index in range(held, r.slices)):
                break  # later ones could be smaller, but the order is the hottest first
            for index in range(held, r.slices):
                room[index] -= sizes[index]
            chosen.append(r)
        if not chosen and not ready and not awaited:
            raise ValueError(f"layer {layer}: the arena holds no expert of {missing[0].slices} slices")
        missing = missing[len(chosen) :]
        keep |= {(layer, r.expert) for r in chosen}
        lacking = [(r, cache.resident(layer, r.expert)) for r in chosen]
        evictions: list[SliceKey] = []
        for r in chosen:
            evictions += cache.insert(ExpertKey(layer, r.expert), r.slices, keep) or ()
        # What was awaited but found no room for the rest of its slices is waited for again, in a later wave.
        here = tuple([e for e in awaited if all(e != r.expert for r in missing)])
        waves.append(Wave(tuple(evictions), tuple(order(layer, lacking, sizes)), tuple(ready), here))
        keep, ready, awaited = set(), [], [e for e in awaited if e not in here] if chosen else []
    return LayerPlan(layer, slices, tuple(waves))


def _there(in_flight: Mapping[ExpertKey, Load], layer: int, expert: int) -> int:
    """The index of the first slice of an expert that is still being read."""
    load = in_flight.get(ExpertKey(layer, expert))
    return _ALL if load is None else load.first


@dataclass
class Scheduler:
    """Cache, order of loads, elastic precision and what has been prefetched.

    ahead: how much may be on its way at a time that nobody waits for, in the unit of the cache's sizes.
    """

    cache: SliceCache
    order: Order = hottest_bit_first
    error_budget: ErrorBudget | None = None
    ahead: int = 0
    _in_flight: dict[ExpertKey, Load] = field(default_factory=dict)
    _planned: int = 0  # the layer of the last plan

    def plan(
        self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1, squares: Sequence[float] = ()
    ) -> LayerPlan:
        """Plan a layer of a step of `tokens` tokens.

        squares: for each routed expert the sum of its tokens' squared router weights, which `error_budget` wants;
        without them all that is wanted is read.
        """
        check(layer, routed)
        self.used(layer, routed, tokens)
        counts = [r.slices for r in routed]
        if self.error_budget is not None and squares:
            have = [self.there(layer, r.expert) for r in routed]
            counts = self.choose(layer, routed, squares, have, tokens)
        return self.plan_chosen(layer, routed, counts)

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1) -> None:
        """Note what the router asks of a layer. Where all of it is in memory, this is all that there is to plan."""
        self.cache.policy.used(layer, routed, tokens)

    def choose(
        self, layer: int, routed: Sequence[RoutedExpert], squares: Sequence[float], have: Sequence[int], tokens: int = 1
    ) -> list[int]:
        """Choose with how many slices each expert is computed, where it has so many in memory."""
        self._planned = layer
        assert self.error_budget is not None
        return self.error_budget.choose(layer, routed, squares, have, tokens)

    def plan_chosen(self, layer: int, routed: Sequence[RoutedExpert], counts: Sequence[int]) -> LayerPlan:
        """Plan a layer whose use and numbers of slices are settled."""
        if self.error_budget is not None:
            routed = [
                r if n == r.slices else RoutedExpert(r.expert, r.tokens, r.weight, n, r.waiting[:n])
                for r, n in zip(routed, counts, strict=True)
            ]
        used = [r for r in routed if r.slices]
        plan = _plan(layer, used, self.cache, self.order, self._in_flight)
        if len(used) < len(routed):
            plan.slices.update((r.expert, 0) for r in routed if not r.slices)
        if self._in_flight:
            for wave in plan.waves:
                self._forget(wave.evictions)
        return plan

    def prefetch(self, predictions: Sequence[Prediction], busy: Collection[ExpertKey] = ()) -> Prefetch:
        """Choose what to read ahead of what the layers to come are predicted to want, and protect what of it is there.

        After that come refinements of what the layer just planned computed with fewer slices than it wanted.

        `predictions` come layer by layer. Likeliest first; each evicts only what is less likely to be used, and nothing
        that is `busy`.
        """
        self.protect(predictions)
        evictions: list[SliceKey] = []
        loads: list[Load] = []
        predictions = [p for p in predictions if p.slices > self.cache.resident(p.layer, p.expert)]
        if not predictions and self.error_budget is None:
            return Prefetch((), ())
        keep = {ExpertKey(p.layer, p.expert) for p in predictions}.union(busy)
        wanted = [
            (p.probability, Load(p.layer, p.expert, self.cache.resident(p.layer, p.expert), p.slices))
            for p in sorted(predictions, key=lambda p: -p.probability)
        ]
        for reuse_score, load in wanted + self._refinements():
            evicted = self.begin(load, reuse_score, keep)
            if evicted is not None:
                keep.add(ExpertKey(load.layer, load.expert))
                evictions += evicted
                loads.append(load)
        return Prefetch(tuple(evictions), tuple(loads))

    def protect(self, predictions: Sequence[Prediction]) -> None:
        """Protect what of this is there; it comes layer by layer."""
        for layer, group in groupby(predictions, key=lambda p: p.layer):
            self.cache.policy.on_prediction(layer, {p.expert: p.probability for p in group})

    def begin(self, load: Load, reuse_score: float, keep: Container[ExpertKey]) -> list[SliceKey] | None:
        """Give room to a prefetch, if nothing has to go for it that is worth as much, or in `keep`.

        Returns what is evicted for it, None where it is not begun.
        """
        key = ExpertKey(load.layer, load.expert)
        if key in self._in_flight or self._nbytes(load) > self.spare:
            return None
        if self.cache.resident(*key) != load.first:  # an earlier one evicted its base
            return None
        evicted = self.cache.insert(key, load.last, keep, reuse_score)
        if evicted is not None:
            self._forget(evicted)
            self._in_flight[key] = load
        return evicted

    @property
    def spare(self) -> int:
        """Return how much more may be on its way that nobody waits for."""
        return self.ahead - sum(map(self._nbytes, self._in_flight.values()))

    def there(self, layer: int, expert: int) -> int:
        """Return how many slices of an expert are in memory and not on their way any more."""
        return min(self.cache.resident(layer, expert), _there(self._in_flight, layer, expert))

    def _refinements(self) -> list[tuple[float, Load]]:
        """Slices that the layer just planned did not wait for: the next token may want them."""
        if self.error_budget is None:
            return []
        layer, policy = self._planned, self.cache.policy
        best = sorted(self.error_budget.left, reverse=True)[:2]
        return [
            (policy.reuse_score(ExpertKey(layer, expert), index), Load(layer, expert, index, index + 1))
            for _, expert, index in best
            if self.cache.resident(layer, expert) == index
        ]

    def arrived(self, load: Load) -> None:
        """A prefetch has been read."""
        if self._in_flight.get(ExpertKey(load.layer, load.expert)) == load:
            del self._in_flight[ExpertKey(load.layer, load.expert)]

    def cancel(self, load: Load) -> None:
        """A prefetch will not be read: its room is free again."""
        key = ExpertKey(load.layer, load.expert)
        if self._in_flight.pop(key, None) is not None:
            self.cache.shrink(key, load.first)

    def _nbytes(self, load: Load) -> int:
        return sum(self.cache.sizes(load.layer)[load.first : load.last])

    def _forget(self, evicted: Sequence[SliceKey]) -> None:
        for layer, expert, index in evicted:
            load = self._in_flight.get(ExpertKey(layer, expert))
            if load is not None and index <= load.first:
                del self._in_flight[ExpertKey(layer, expert)]
