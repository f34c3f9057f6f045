"""Executes plans: the experts of one layer, from routing to their weighted sum."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from moert.quant.format import MAX_WIDTH
from moert.quant.rows import add_rows, combine
from moert.runtime.loading import Loader
from moert.runtime.lookahead import Guess, LookAhead
from moert.runtime.telemetry import Counters, Telemetry
from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES, RecentScore
from moert.scheduler.hebf import ORDERS
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Precision
from moert.scheduler.predictor import Predictor
from moert.scheduler.types import ExpertKey, Plan, RoutedExpert
from moert.scheduler.warm import Memory, remember, restore
from moert.store.reader import Store

_AHEAD_BYTES = 12 << 20  # prefetches on their way: about what a fast disk reads while two layers compute


_Places: TypeAlias = dict[int, dict[int, Tensor]]


@dataclass(slots=True)
class _Step:
    """One layer of one step on its way.

    places: for each expert and each number of slices that it is wanted with, where it stands in the flattened [T, K]
    indices. parts: float32 [T * K, D], filled from the front, `filled` rows so far. computed: the places of these rows.
    """

    plan: Plan
    x: Tensor
    places: _Places
    parts: Tensor
    filled: int = 0
    computed: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Policies:
    """Which policies decide.

    cache: a name in `POLICIES`. order: one in `ORDERS`. horizons: how many layers to look ahead; of several numbers the
    one is used that is measured to be fastest. overlap: whether experts compute while others are read (False is a
    baseline to measure against).
    """

    cache: str = RecentScore.name
    order: str = "hottest"
    horizons: tuple[int, ...] = (0, 1)
    overlap: bool = True


class ExpertRunner:
    """Computes routed experts out of the arena, and reads what is missing. Not safe to call from two threads."""

    def __init__(
        self,
        store: Store,
        slots: Sequence[int],
        precision: Precision,
        activation: str,
        policies: Policies | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        self._store, self._layout, self._slots = store, store.layout, tuple(slots)
        self._policies = policies or Policies()
        self.telemetry = Telemetry(store.layout.widths, store.kept)
        self._loader = Loader(store, slots, activation, self.telemetry, self._policies.overlap)
        self._parts = torch.empty(0)
        # layer, experts, weights, and the slices that were wanted and used
        self._unplanned: deque[tuple[int, Sequence[int], Sequence[float], Sequence[int], Sequence[int]]] = deque()
        self._scheduler = Scheduler(self._new_cache(), ORDERS[self._policies.order], ahead=_AHEAD_BYTES)
        self.foresight = LookAhead(self._policies.horizons, predictor)
        self._first_layer = min(store.kept)
        self.use(precision)

    def _new_cache(self) -> SliceCache:
        kept = self._store.kept
        policy = POLICIES[self._policies.cache](list(kept), max(map(len, kept.values())), len(self._slots))
        sizes = self._layout.slice_sizes
        capacity = [n * size for n, size in zip(self._slots, sizes, strict=True)]
        return SliceCache(capacity, policy, dict.fromkeys(kept, sizes))

    @property
    def counters(self) -> Counters:
        """Up to date when it is asked for."""
        self._catch_up()
        return self.telemetry.counters

    def layer_counters(self, decoding: bool) -> dict[int, Counters]:
        """The same for each layer, of decoding or of prompts."""
        self._catch_up()
        return self.telemetry.layers(decoding)

    def begin(self, decoding: bool, count: int, first: int | None = None) -> AbstractContextManager[object]:
        """Around a pass of `count` tokens, from position `first` on or of several sequences.

        Decoding and prompts are counted for themselves.
        """
        if decoding != self.telemetry.decoding:
            self._catch_up()
            self.telemetry.decoding = decoding
        return self.telemetry.step(count, first)

    def use(self, precision: Precision) -> None:
        """Compute at another precision from the next call on; its slices must have slots.

        An expert that the store has fewer slices of is computed with all that it has.
        """
        self._catch_up()
        widths, kept = self._layout.widths, self._store.kept
        self._precision, self._chooser = precision, precision.chooser(widths, kept)
        self._scheduler.ladder = precision.ladder(widths, kept, self._layout.slice_sizes)

    def preload(self) -> None:
        """Read all experts, if the arena holds all of them at the width in use; else nothing happens."""
        most = self._precision.slices(self._layout.widths)
        wanted = {layer: [min(n, most) for n in kept] for layer, kept in self._store.kept.items()}
        needed = [sum(n > i for counts in wanted.values() for n in counts) for i in range(most)]
        if any(slots < count for slots, count in zip(self._slots, needed, strict=False)):
            return
        try:
            for layer, slices in wanted.items():
                routed = [RoutedExpert(e, 1, 0.0, n) for e, n in enumerate(slices)]
                for wave in self._scheduler.plan(layer, routed).waves:
                    self._loader.run(wave, layer, lambda ready: None)
        except BaseException:
            self._recover()
            raise

    def remember(self) -> Memory:
        """What the arena holds, for a later run."""
        self._catch_up()
        return remember(self._scheduler.cache, self._store.kept)

    def warm(self, memory: Memory) -> int:
        """Read what another run held into the empty arena, so far as it fits; returns the bytes read."""
        try:
            loads = restore(self._scheduler.cache, memory, self._precision.slices(self._layout.widths))
            reads = [(load, self._loader.start(load)) for load in loads]
            for load, read in reads:
                self._loader.arrived(load, read)
            self.telemetry.restart()  # these are nobody's
            return sum(read.nbytes for _, read in reads)
        except BaseException:
            self._recover()
            raise

    def close(self) -> None:
        self._loader.close()

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the routed experts.

        x: float32 [T, D]. indices: int64 [T, K], no expert twice in a row. weights: float32 [T, K].
        Returns float32 [T, D]. Raises StoreError where an expert cannot be read.
        """
        self._catch_up()
        self.telemetry.reached(layer)
        self.foresight.pause()
        counts = torch.from_numpy(self._chooser.many(layer, indices.numpy(), weights.numpy()))
        places, sums = _places_by_expert(indices, counts), _sum_by_expert(indices, weights)
        routed = [
            RoutedExpert(e, sum(at.shape[0] for at in groups.values()), sums[e], max(groups), _waiting(groups))
            for e, groups in places.items()
        ]
        squares: list[float] = []
        if self._scheduler.ladder is not None:
            sums = _sum_by_expert(indices, weights.square())
            squares = [sums[e] for e in places]
        try:
            self._arrived()
            plan = self._scheduler.plan(layer, routed, len(x), squares)
            tokens = ((min(n, plan.slices[e]), at.shape[0]) for e, groups in places.items() for n, at in groups.items())
            self.telemetry.planned(layer, plan.slices, len(plan.waves[0].resident), tokens)
            return self._run(plan, x, places, weights)
        except BaseException:  # Ctrl-C too, wherever it strikes
            self._recover()
            raise

    def bonus(self, layer: int, choices: int) -> Tensor | None:
        """For those in memory, unless so many are chosen that nearly all experts are needed anyway."""
        route, present = self._precision.route, self._loader.present[layer]
        return torch.from_numpy(present * np.float32(route)) if route and choices <= len(present) else None

    def add_one(self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
        """The same for a single token, added to `out`: x and out float32 contiguous [1, D].

        What decoding calls. Where all experts are in memory, there is nothing to plan: they are computed at once, and
        the cache learns of it later, for several layers at a time, while Python's own data are in the processor's
        caches.
        """
        self.telemetry.reached(layer)
        before = time.perf_counter()
        if layer == self._first_layer:
            self.foresight.step(before)
        wanted, table = self._chooser.one(layer, experts, weights), self._loader.table
        try:
            if self.foresight.guesses:
                self._catch_up()  # what a prefetch evicts must not be planned afterwards
                self._arrived()
            counts = wanted
            if self._scheduler.ladder is not None:
                held, squares = table.held(layer, experts), [w * w for w in weights]
                counts = self._scheduler.settle(layer, _routed(experts, weights, wanted), squares, held)
            if self.foresight.guesses and not table.missing(layer, experts, counts):
                self._look_ahead(layer, experts)
            if table.add(layer, experts, counts, weights, x, out):
                self.telemetry.computed(layer, len(experts), before)
                self._unplanned.append((layer, experts, weights, wanted, counts))
                return
            self._catch_up()
            routed = _routed(experts, weights, wanted)
            self._scheduler.used(layer, routed)
            plan = self._scheduler.plan_settled(layer, routed, counts)
            self.telemetry.planned(layer, plan.slices, len(plan.waves[0].resident), ((n, 1) for n in counts))
            self._run_one(plan, x, experts, weights, out)
        except BaseException:
            self._recover()
            raise

    @property
    def horizon(self) -> int:
        """For how many layers ahead guesses are wanted now."""
        return self.foresight.horizon

    def tokens(self, ids: Sequence[int]) -> None:
        """Told before a pass which tokens it has."""
        self.foresight.tokens(ids)

    def foresee(self, layer: int, guesses: Sequence[Guess]) -> None:
        """Told before the experts of `layer` are computed what the next layers will probably ask for; -1: before all
        layers, when there is nothing else to read yet."""
        self.foresight.hear(layer, guesses)
        if layer < 0:
            try:
                self._catch_up()
                self._arrived()
                self._prefetch(())
            except BaseException:
                self._recover()
                raise

    def _foreseen_slices(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Sequence[int]:
        """How much of them to prefetch: the base alone where it can be computed with."""
        if self._scheduler.ladder is not None:
            return [1] * len(experts)
        return self._chooser.one(layer, experts, weights)

    def _look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch what was guessed, now that all that `layer` waits for has been asked for."""
        for load in self._loader.unwanted(layer, experts):
            self._scheduler.cancel(load)
        self.foresight.learn(layer, experts)
        self._prefetch([ExpertKey(layer, e) for e in experts])

    def _prefetch(self, busy: Sequence[ExpertKey]) -> None:
        predictions = self.foresight.predictions(self._foreseen_slices, self._loader.table.missing)
        prefetch = self._scheduler.prefetch(predictions, busy)
        self._loader.release(prefetch.evictions)
        for load in prefetch.loads:
            self._loader.start(load, ahead=True)

    def _arrived(self) -> None:
        """Take note of what was prefetched meanwhile."""
        for load in self._loader.collect():
            self._scheduler.arrived(load)

    def _catch_up(self) -> None:
        """Take note of the layers that were computed at once: nothing is loaded, but the cache learns of the use."""
        while self._unplanned:
            layer, experts, weights, wanted, counts = self._unplanned.popleft()
            self._scheduler.used(layer, _routed(experts, weights, wanted))
            slices = dict(zip(experts, counts, strict=True))
            self.telemetry.planned(layer, slices, len(slices), ((n, 1) for n in counts))

    def _run(self, plan: Plan, x: Tensor, places: _Places, weights: Tensor) -> Tensor:
        """Wave by wave."""
        step = _Step(plan, x, places, self._room(weights.numel(), x.shape[1]))
        self._leave_out(step)
        for wave in plan.waves:
            self._loader.run(wave, plan.layer, functools.partial(self._compute, step))
        # The contributions stand in the order in which they were computed; they are added in the order of their rank,
        # so that the result does not depend on what was in memory.
        order = torch.cat(step.computed)
        return combine(step.parts, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))), weights)

    def _run_one(self, plan: Plan, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
        """The same for a single token, without a tensor for each expert."""
        layer, slices = plan.layer, plan.slices
        parts = self._room(len(experts), x.shape[1])
        waiting = {e: rank for rank, e in enumerate(experts) if slices[e]}
        rows = list(waiting.values())

        def compute(ready: dict[int, int]) -> None:
            now = [e for e, there in ready.items() if e in waiting and slices[e] <= there]
            if now:
                before = time.perf_counter()
                ranks = [waiting.pop(e) for e in now]
                self._loader.table.compute_one(layer, now, [slices[e] for e in now], ranks, x, parts)
                self.telemetry.computed(layer, len(now), before)

        look = functools.partial(self._look_ahead, layer, experts)  # once: it takes the guesses
        for wave in plan.waves:
            self._loader.run(wave, layer, compute, look if self.foresight.guesses else None)
        add_rows(parts, rows, [weights[rank] for rank in rows], out)

    def _room(self, rows: int, size: int) -> Tensor:
        """Float32 [rows, size], valid until the next call: kept, because new pages cost more than what is written."""
        if self._parts.numel() < rows * size:
            self._parts = torch.empty(rows * size)
        return self._parts[: rows * size].view(rows, size)

    def _leave_out(self, step: _Step) -> None:
        """What the plan leaves out contributes nothing."""
        for e in [e for e, n in step.plan.slices.items() if n == 0]:
            for at in step.places.pop(e).values():
                step.parts[step.filled : step.filled + len(at)] = 0
                step.computed.append(at)
                step.filled += len(at)

    def _compute(self, step: _Step, ready: dict[int, int]) -> None:
        """Compute what waits for experts of which so many slices are there by now."""
        groups: list[tuple[int, int, Tensor]] = []
        for e, there in ready.items():
            most, waiting = step.plan.slices[e], step.places[e]
            for n in [n for n in waiting if min(n, most) <= there]:
                groups.append((e, min(n, most), waiting.pop(n)))
        if not groups:
            return
        before = time.perf_counter()
        experts, slices, at = zip(*groups, strict=True)
        K = step.parts.shape[0] // step.x.shape[0]
        rows = sum(map(len, at))
        out = step.parts[step.filled : step.filled + rows]
        tokens_of = [places // K for places in at]
        self._loader.table.compute(step.plan.layer, experts, slices, tokens_of, step.x, out)
        step.computed += at
        step.filled += rows
        self.telemetry.computed(step.plan.layer, len(experts), before)

    def _recover(self) -> None:
        """Begin afresh with what is surely in the arena, after a step that broke off somewhere.

        The cache may be anywhere between two states, so it is made anew from the slots that are filled.
        """
        prefixes = self._loader.recover()
        self._unplanned.clear()
        self._scheduler = Scheduler(self._new_cache(), self._scheduler.order, self._scheduler.ladder, _AHEAD_BYTES)
        for expert, count in prefixes.items():
            self._scheduler.cache.insert(expert, count, ())


def _routed(experts: Sequence[int], weights: Sequence[float], slices: Sequence[int]) -> list[RoutedExpert]:
    """What a single token asks of a layer."""
    return [RoutedExpert(e, 1, w, n) for e, w, n in zip(experts, weights, slices, strict=True)]


def _places_by_expert(indices: Tensor, counts: Tensor) -> _Places:
    """Positions in the flattened [T, K] indices at which each expert stands with each number of slices, ascending."""
    most = MAX_WIDTH + 1  # above any number of slices
    flat = (indices * most + counts).flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat)
    found = sizes.nonzero().flatten()
    result: _Places = {}
    for key, at in zip(found.tolist(), torch.split(order, sizes[found].tolist()), strict=True):
        result.setdefault(key // most, {})[key % most] = at
    return result


def _waiting(groups: dict[int, Tensor]) -> tuple[int, ...]:
    """For each slice the number of tokens that need it; empty where all need all of them."""
    if len(groups) == 1:
        return ()
    return tuple(sum(len(at) for n, at in groups.items() if n > index) for index in range(max(groups)))


def _sum_by_expert(indices: Tensor, weights: Tensor) -> dict[int, float]:
    flat = indices.flatten()
    sums = torch.zeros(int(flat.max()) + 1).index_add_(0, flat, weights.flatten())
    return dict(enumerate(sums.tolist()))
