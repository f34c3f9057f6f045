"""Executes plans: the experts of one layer, from routing to their weighted sum."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from moert.kernels.elementwise import add_rows, combine
from moert.runtime.loader import Loader
from moert.runtime.lookahead import LookAhead, RouterPrediction
from moert.runtime.routing import TokenGroups, route_token, route_tokens, sums_by_expert
from moert.runtime.telemetry import Counters, Telemetry
from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES, RecentScore
from moert.scheduler.hebf import ORDERS
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Precision
from moert.scheduler.predictor import Predictor
from moert.scheduler.types import ExpertKey, LayerPlan, RoutedExpert
from moert.scheduler.warm import Memory, remember, restore
from moert.store.reader import Store

_AHEAD_BYTES = 12 << 20  # prefetches on their way: about what a fast disk reads while two layers compute


More: TypeAlias = Callable[[], Tensor | None]


def nothing_more() -> None:
    """Beside what is computed here."""


@dataclass(slots=True)
class _Step:
    """One layer of one step on its way.

    places: for each expert and each number of slices that it is wanted with, where it stands in the flattened [T, K]
    indices. parts: float32 [T * K, D], filled from the front, `filled` rows so far. computed: the places of these rows.
    """

    plan: LayerPlan
    x: Tensor
    places: TokenGroups
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
        self._scheduler.error_budget = precision.error_budget(widths, kept, self._layout.slice_sizes)

    def preload(self) -> None:
        """Read all experts, if the arena holds all of them at the width in use; else nothing happens."""
        if not self._holds_all(self._slots):
            return
        try:
            for layer, routed in self._all().items():
                for wave in self._scheduler.plan(layer, routed).waves:
                    self._loader.run(wave, layer, lambda ready: None)
        except BaseException:
            self._recover()
            raise

    def _all(self) -> dict[int, list[RoutedExpert]]:
        """Every expert of each layer, as wide as it is wanted and kept."""
        most = self._precision.slices(self._layout.widths)
        return {
            layer: [RoutedExpert(e, 1, 0.0, min(n, most)) for e, n in enumerate(kept)]
            for layer, kept in self._store.kept.items()
        }

    def _holds_all(self, slots: Sequence[int]) -> bool:
        """Whether so many slots of each slice index are enough for all experts at the width in use."""
        every = [r.slices for routed in self._all().values() for r in routed]
        return all(sum(n > index for n in every) <= count for index, count in enumerate(slots))

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
        places, routed = route_tokens(indices, weights, counts)
        squares: list[float] = []
        if self._scheduler.error_budget is not None:
            sums = sums_by_expert(indices, weights.square())
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

    def routing_bias(self, layer: int, choices: int) -> Tensor | None:
        """For those in memory, unless so many are chosen that nearly all experts are needed anyway."""
        route, present = self._precision.route, self._loader.present[layer]
        return torch.from_numpy(present * np.float32(route)) if route and choices <= len(present) else None

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
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
            if self._scheduler.error_budget is not None:
                held, squares = table.held(layer, experts), [w * w for w in weights]
                counts = self._scheduler.choose(layer, route_token(experts, weights, wanted), squares, held)
            if self.foresight.guesses and not table.missing(layer, experts, counts):
                self._look_ahead(layer, experts)
            if table.add(layer, experts, counts, weights, x, out):
                self.telemetry.computed(layer, len(experts), before)
                self._unplanned.append((layer, experts, weights, wanted, counts))
                return
            self._catch_up()
            routed = route_token(experts, weights, wanted)
            self._scheduler.used(layer, routed)
            plan = self._scheduler.plan_chosen(layer, routed, counts)
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

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Told before the experts of `layer` are computed what the next layers will probably ask for; -1: before all
        layers, when there is nothing else to read yet."""
        self.foresight.on_router_prediction(layer, guesses)
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
        if self._scheduler.error_budget is not None:
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
            self._scheduler.used(layer, route_token(experts, weights, wanted))
            slices = dict(zip(experts, counts, strict=True))
            self.telemetry.planned(layer, slices, len(slices), ((n, 1) for n in counts))

    def _run(
        self, plan: LayerPlan, x: Tensor, places: TokenGroups, weights: Tensor, more: More = nothing_more
    ) -> Tensor:
        """Wave by wave. more: what is added in the end, float64 [T, D]."""
        places = {e: groups for e, groups in places.items() if plan.slices[e]}
        step = _Step(plan, x, places, self._room(weights.numel(), x.shape[1]))
        self._waves(plan, functools.partial(self._compute, step))
        # They stand in the order in which they were computed. What the plan leaves out has no row.
        rows = torch.full((weights.numel(),), -1)
        if step.computed:
            order = torch.cat(step.computed)
            rows[order] = torch.arange(len(order))
        return combine(step.parts[: step.filled], rows, weights, more())

    def _waves(
        self, plan: LayerPlan, compute: Callable[[dict[int, int]], None], meanwhile: Callable[[], None] | None = None
    ) -> None:
        for wave in plan.waves:
            self._loader.run(wave, plan.layer, compute, meanwhile)

    def _run_one(
        self,
        plan: LayerPlan,
        x: Tensor,
        experts: Sequence[int],
        weights: Sequence[float],
        out: Tensor,
        more: More = nothing_more,
    ) -> None:
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

        def look() -> None:
            if self.foresight.guesses:  # once: it takes them
                self._look_ahead(layer, experts)

        self._waves(plan, compute, look)
        add_rows(parts, rows, [weights[rank] for rank in rows], out, more())

    def _room(self, rows: int, size: int) -> Tensor:
        """Float32 [rows, size], valid until the next call: kept, because new pages cost more than what is written."""
        if self._parts.numel() < rows * size:
            self._parts = torch.empty(rows * size)
        return self._parts[: rows * size].view(rows, size)

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
        self._scheduler = Scheduler(
            self._new_cache(), self._scheduler.order, self._scheduler.error_budget, _AHEAD_BYTES
        )
        for expert, count in prefixes.items():
            self._scheduler.cache.insert(expert, count, ())
