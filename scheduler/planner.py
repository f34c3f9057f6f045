"""Turns what the router asks into a plan, and advances the cache to the state after that plan.

`Scheduler` is the one object that the runtime and the simulator both drive. It knows no clock, no file and no thread:
what it is told, in which order, decides what it says.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from moert.scheduler.cache import Change, SliceCache
from moert.scheduler.elastic import ErrorBudget
from moert.scheduler.hebf import Order, hottest_bit_first, hottest_first
from moert.scheduler.types import ExpertKey, LayerPlan, Load, Prediction, Prefetch, RoutedExpert, Wave


def check(layer: int, routed: Sequence[RoutedExpert]) -> None:
    """Raises ValueError for an expert without tokens or slices."""
    if any(r.tokens < 1 or r.slices < 1 for r in routed):
        raise ValueError(f"layer {layer}: an expert with no tokens or no slices among {list(routed)}")


@dataclass
class Scheduler:
    """Decides what is read, evicted and computed, layer by layer, over the state that `cache` keeps.

    ahead: how much may be on its way at a time that nobody waits for, in the unit of the cache's sizes.
    """

    cache: SliceCache
    order: Order = hottest_bit_first
    error_budget: ErrorBudget | None = None
    ahead: int = 0
    _planned: int = 0  # the layer whose numbers of slices were chosen last

    def plan(
        self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1, squares: Sequence[float] = ()
    ) -> LayerPlan:
        """Plan a layer of a step of `tokens` tokens in one go.

        For those whose reads end before the next call. squares: for each routed expert the sum of its tokens' squared
        router weights, which `error_budget` wants; without them all that is wanted is read.
        """
        check(layer, routed)
        self.used(layer, routed, tokens)
        counts = [r.slices for r in routed]
        if self.error_budget is not None and squares:
            have = [self.cache.there(layer, r.expert) for r in routed]
            counts = self.choose(layer, routed, squares, have, tokens)
        waves = []
        for wave in self.waves(layer, routed, counts):
            self.done(wave)
            waves.append(wave)
        self.pin(layer, ())
        return LayerPlan(layer, {r.expert: n for r, n in zip(routed, counts, strict=True)}, tuple(waves))

    def used(self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1) -> None:
        """Learn what the router asks of a layer. Where all of it is in memory, this is all that there is to plan."""
        self.cache.policy.used(layer, routed, tokens)

    def choose(
        self, layer: int, routed: Sequence[RoutedExpert], squares: Sequence[float], have: Sequence[int], tokens: int = 1
    ) -> list[int]:
        """Choose with how many slices each expert is computed, where it has so many in memory."""
        self._planned = layer
        assert self.error_budget is not None
        return self.error_budget.choose(layer, routed, squares, have, tokens)

    def pin(self, layer: int, experts: Sequence[int]) -> None:
        """Let nothing evict these experts, which are in use; those pinned before are not any more."""
        self.cache.in_use = {(layer, e) for e in experts}

    def waves(self, layer: int, routed: Sequence[RoutedExpert], counts: Sequence[int]) -> Iterator[Wave]:
        """Plan a layer whose use is known and whose numbers of slices are chosen, wave by wave.

        Experts that are resident compute first. What is missing is loaded in waves, as many experts at a time as fit,
        each read once. A wave is planned, and its experts are pinned, when it is asked for: that is when the one before
        has been carried out, all its loads `arrived`. Deterministic. Raises ValueError where the room cannot hold a
        single one of the experts.
        """
        cache = self.cache
        ready: list[int] = []
        missing: list[RoutedExpert] = []
        awaited: list[int] = []
        if self.error_budget is not None:
            routed = [
                r if n == r.slices else RoutedExpert(r.expert, r.tokens, r.weight, n, r.waiting[:n])
                for r, n in zip(routed, counts, strict=True)
                if n
            ]
        for r in hottest_first(routed):
            there = cache.resident(layer, r.expert) >= r.slices
            if cache.in_flight and cache.there(layer, r.expert) < min(r.slices, cache.resident(layer, r.expert)):
                awaited.append(r.expert)
                if there:
                    continue
            if there:
                ready.append(r.expert)
            else:
                missing.append(r)
        self.pin(layer, [*ready, *awaited])
        if not missing:  # many steps, so they do not pay for what follows
            yield Wave((), (), tuple(ready), tuple(awaited))
            return
        sizes = cache.sizes(layer)
        # Where all experts of the layer fit whatever else is there, which is usual for a single token, nobody need
        # count.
        roomy = all(len(routed) * size <= most for size, most in zip(sizes, cache.capacity, strict=True))
        keep = {(layer, e) for e in [*ready, *awaited]}  # equal to ExpertKeys, and made much faster
        while missing or ready or awaited:
            chosen = missing if roomy else self._fitting(layer, missing, keep)
            if not chosen and not keep:
                raise ValueError(f"layer {layer}: the arena holds no expert of {missing[0].slices} slices")
            missing = missing[len(chosen) :]
            cache.in_use = keep | {(layer, r.expert) for r in chosen}
            lacking = [(r, cache.resident(layer, r.expert)) for r in chosen]
            change = cache.draft()
            for r in chosen:
                change.insert(ExpertKey(layer, r.expert), r.slices)
            loads = self.order(layer, lacking, sizes)
            for load in loads:
                change.load(load)
            cache.commit(change)
            # What was awaited but found no room for the rest of its slices is waited for again, in a later wave.
            here = tuple([e for e in awaited if all(e != r.expert for r in missing)])
            wave = Wave(tuple(change.evicted), tuple(loads), tuple(ready), here)
            keep, ready, awaited = set(), [], [e for e in awaited if e not in here]
            if chosen or wave.resident or here:
                yield wave

    def _fitting(
        self, layer: int, missing: Sequence[RoutedExpert], keep: set[tuple[int, int]]
    ) -> Sequence[RoutedExpert]:
        """Return as many of the first as there is room for beside `keep`."""
        cache = self.cache
        sizes, room = cache.sizes(layer), cache.room(keep)
        for number, r in enumerate(missing):
            held = cache.resident(layer, r.expert) if (layer, r.expert) in keep else 0
            if any(room[index] < sizes[index] for index in range(held, r.slices)):
                return missing[:number]  # later ones could be smaller, but the order is the hottest first
            for index in range(held, r.slices):
                room[index] -= sizes[index]
        return missing

    def done(self, wave: Wave) -> None:
        """Note that all that was read for a wave is there."""
        for load in wave.loads:
            self.arrived(load)

    def prefetch(self, predictions: Sequence[Prediction]) -> Prefetch:
        """Choose what to read ahead of what the layers to come are predicted to want, and protect what of it is there.

        After that come refinements of what the layer just planned computed with fewer slices than it wanted.

        `predictions` come layer by layer. Likeliest first; each evicts only what is less likely to be used, and nothing
        that is pinned.
        """
        self.protect(predictions)
        predictions = [p for p in predictions if p.slices > self.cache.resident(p.layer, p.expert)]
        if not predictions and self.error_budget is None:
            return Prefetch((), ())
        keep = {ExpertKey(p.layer, p.expert) for p in predictions}
        wanted = [
            (p.probability, Load(p.layer, p.expert, self.cache.resident(p.layer, p.expert), p.slices))
            for p in sorted(predictions, key=lambda p: -p.probability)
        ]
        change = self.cache.draft()
        for reuse_score, load in wanted + self._refinements():
            if self._add(change, load, reuse_score, keep):
                keep.add(ExpertKey(load.layer, load.expert))
        self.cache.commit(change)
        return Prefetch(tuple(change.evicted), tuple(change.loads))

    def protect(self, predictions: Sequence[Prediction]) -> None:
        """Protect what of this is there; it comes layer by layer."""
        for layer, group in groupby(predictions, key=lambda p: p.layer):
            self.cache.policy.on_prediction(layer, {p.expert: p.probability for p in group})

    def begin(self, load: Load, reuse_score: float, keep: Container[ExpertKey]) -> Prefetch | None:
        """Give room to a prefetch, if nothing has to go for it that is worth as much, or pinned, or in `keep`.

        Returns None where it is not begun.
        """
        change = self.cache.draft()
        if not self._add(change, load, reuse_score, keep):
            return None
        self.cache.commit(change)
        return Prefetch(tuple(change.evicted), (load,))

    def _add(self, change: Change, load: Load, reuse_score: float, keep: Container[ExpertKey]) -> bool:
        key = ExpertKey(load.layer, load.expert)
        if change.loading(key) or change.ahead + self.cache.nbytes(load) > self.ahead:
            return False
        if change.held(key) != load.first:  # an earlier one evicted its base
            return False
        if not change.insert(key, load.last, keep, reuse_score):
            return False
        change.load(load, ahead=True)
        return True

    @property
    def spare(self) -> int:
        """Return how much more may be on its way that nobody waits for."""
        return self.ahead - sum(self.cache.ahead.values())

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
        """Note that a load in flight has been read."""
        self.cache.arrived(load)

    def cancel(self, load: Load) -> None:
        """Note that a load in flight will not be read: its room is free again."""
        self.cache.cancel(load)
