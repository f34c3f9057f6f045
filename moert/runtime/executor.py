"""Executes plans: the experts of one layer, from routing to their weighted sum."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moert.runtime.host import HostExperts
from moert.runtime.residency import Residency
from moert.runtime.routing import TokenGroups, route_token, route_tokens, sums_by_expert
from moert.runtime.telemetry import Counters, Telemetry
from moert.runtime.waves import Compute, WaveRunner
from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES, RecentScore
from moert.scheduler.hebf import ORDERS
from moert.scheduler.lookahead import LookAhead
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Precision
from moert.scheduler.predictor import Predictor
from moert.scheduler.types import RoutedExpert, RouterPrediction, Wave
from moert.scheduler.warm import Memory, remember, restore
from moert.store.reader import Store

_AHEAD_BYTES = 12 << 20  # prefetches on their way: about what a fast disk reads while two layers compute


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies that decide, by name.

    cache: a name in `POLICIES`. order: one in `ORDERS`. horizons: how many layers to look ahead; of several numbers the
    one is used that is measured to be fastest. overlap: whether experts compute while others are read (False is a
    baseline to measure against).
    """

    cache: str = RecentScore.name
    order: str = "hottest"
    horizons: tuple[int, ...] = (0, 1)
    overlap: bool = True

    def new_cache(self, store: Store, slots: Sequence[int]) -> SliceCache:
        """Make an empty cache with room for so many slices of each index."""
        kept, sizes = store.kept, store.layout.slice_sizes
        policy = POLICIES[self.cache](list(kept), max(map(len, kept.values())), len(sizes))
        return SliceCache([n * size for n, size in zip(slots, sizes, strict=True)], policy, dict.fromkeys(kept, sizes))


class ExpertRunner:
    """Computes routed experts out of the arena, and reads what is missing. Not safe to call from two threads.

    An error or Ctrl-C in any call leaves it as right as it was: see `Residency`. Its parts, which a device's runner
    uses too: `residency`, `scheduler`, `waves`, `experts` (what computes), `lookahead`, `telemetry`.
    """

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
        policies = policies or Policies()
        cache = policies.new_cache(store, slots)
        self.telemetry = Telemetry(store.layout.widths, store.kept)
        self.residency = Residency(store, slots, cache, activation, self.telemetry)
        self.scheduler = Scheduler(cache, ORDERS[policies.order], ahead=_AHEAD_BYTES)
        self.waves = WaveRunner(self.residency, store.layout.num_slices, self.telemetry, policies.overlap)
        self.experts = HostExperts(self.residency.table, self.telemetry)
        self.lookahead = LookAhead(policies.horizons, predictor)
        # Layers that were computed at once: layer, experts, weights, and the slices that were wanted and used.
        self._computed: deque[tuple[int, Sequence[int], Sequence[float], Sequence[int], Sequence[int]]] = deque()
        self._first_layer = min(store.kept)
        self.use(precision)

    @property
    def counters(self) -> Counters:
        """Return what was counted, up to date."""
        self._tell_used()
        return self.telemetry.counters

    def layer_counters(self, decoding: bool) -> dict[int, Counters]:
        """Return what was counted for each layer, of decoding or of prompts."""
        self._tell_used()
        return self.telemetry.layers(decoding)

    def begin(self, decoding: bool, count: int, first: int | None = None) -> AbstractContextManager[object]:
        """Enter a pass of `count` tokens, from position `first` on or of several sequences.

        Decoding and prompts are counted for themselves.
        """
        if decoding != self.telemetry.decoding:
            self._tell_used()
            self.telemetry.decoding = decoding
        return self.telemetry.step(count, first)

    def use(self, precision: Precision) -> None:
        """Compute at another precision from the next call on; its slices must have slots.

        An expert that the store has fewer slices of is computed with all that it has.
        """
        self._tell_used()
        widths, kept = self._layout.widths, self._store.kept
        self.precision, self.chooser = precision, precision.chooser(widths, kept)
        self.scheduler.error_budget = precision.error_budget(widths, kept, self._layout.slice_sizes)

    def preload(self, before_layer: Callable[[], None] = lambda: None) -> None:
        """Read all experts, if the arena holds all of them at the width in use; else nothing happens.

        before_layer: called before each layer is read; may raise, to read no more.
        """
        if not self.holds_all(self._slots):
            return
        for layer, routed in self.every_expert().items():
            before_layer()
            self._tell_used(layer, routed)
            self.residency.update()
            for wave in self.scheduler.waves(layer, routed, [r.slices for r in routed]):
                self.waves.run(wave, layer, lambda ready: None)

    def every_expert(self) -> dict[int, list[RoutedExpert]]:
        """Return every expert of each layer, as wide as it is wanted and kept."""
        most = self.precision.slices(self._layout.widths)
        return {
            layer: [RoutedExpert(e, 1, 0.0, min(n, most)) for e, n in enumerate(kept)]
            for layer, kept in self._store.kept.items()
        }

    def holds_all(self, slots: Sequence[int]) -> bool:
        """Tell whether so many slots of each slice index are enough for all experts at the width in use."""
        every = [r.slices for routed in self.every_expert().values() for r in routed]
        return all(sum(n > index for n in every) <= count for index, count in enumerate(slots))

    def remember(self) -> Memory:
        """Say what the arena holds, for a later run."""
        self._tell_used()
        return remember(self.scheduler.cache, self._store.kept)

    def warm(self, memory: Memory) -> int:
        """Read what another run held into the empty arena, so far as it fits; returns the bytes read."""
        self.residency.update()
        loads = restore(self.scheduler.cache, memory, self.precision.slices(self._layout.widths))
        self.residency.carry_out()
        for load in loads:
            self.residency.arrived(load)
        self.telemetry.restart()  # these are nobody's
        return sum(map(self.scheduler.cache.nbytes, loads))

    def close(self) -> None:
        """End the reading threads."""
        self.residency.close()

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Compute the weighted sum of the routed experts.

        x: float32 [T, D]. indices: int64 [T, K], no expert twice in a row. weights: float32 [T, K].
        Returns float32 [T, D]. Raises StoreError where an expert cannot be read.
        """
        self.telemetry.reached(layer)
        self.lookahead.pause()
        places, routed, squares = self.ask(layer, indices, weights)
        self._tell_used(layer, routed, len(x))
        self.residency.update()
        counts = [r.slices for r in routed]
        if self.scheduler.error_budget is not None:
            held = [self.scheduler.cache.there(layer, r.expert) for r in routed]
            counts = self.scheduler.choose(layer, routed, squares, held, len(x))
        slices = {r.expert: n for r, n in zip(routed, counts, strict=True)}
        tokens = [(min(n, slices[e]), at.shape[0]) for e, groups in places.items() for n, at in groups.items()]
        waves = self.scheduler.waves(layer, routed, counts)
        bring = functools.partial(self._bring, layer, waves, slices, tokens, None)
        return self.experts.sum_tokens(layer, slices, x, places, weights, bring)

    def ask(self, layer: int, indices: Tensor, weights: Tensor) -> tuple[TokenGroups, list[RoutedExpert], list[float]]:
        """Say what many tokens ask of a layer: where, of whom, and, for an error budget, their squared weights."""
        counts = torch.from_numpy(self.chooser.many(layer, indices.numpy(), weights.numpy()))
        places, routed = route_tokens(indices, weights, counts)
        if self.scheduler.error_budget is None:
            return places, routed, []
        sums = sums_by_expert(indices, weights.square())
        return places, routed, [sums[e] for e in places]

    def routing_bias(self, layer: int, choices: int) -> Tensor | None:
        """Return the bias [E] that favours experts in memory; None where there is none, or nearly all are needed."""
        route, present = self.precision.route, self.residency.present[layer]
        return torch.from_numpy(present * np.float32(route)) if route and choices <= len(present) else None

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
        """Add the weighted sum of a single token to `out`: x and out float32 contiguous [1, D].

        What decoding calls. Where all experts are in memory, there is nothing to plan: they are computed at once, and
        the scheduler learns of it later, for several layers at a time, while Python's own data are in the processor's
        caches.
        """
        self.telemetry.reached(layer)
        before = time.perf_counter()
        if layer == self._first_layer:
            self.lookahead.step(before)
        wanted, table = self.chooser.one(layer, experts, weights), self.residency.table
        if self.lookahead.guesses:
            self._tell_used()  # what a prefetch evicts must not be planned afterwards
            self.residency.update()
        counts = wanted
        if self.scheduler.error_budget is not None:
            held, squares = table.held(layer, experts), [w * w for w in weights]
            counts = self.scheduler.choose(layer, route_token(experts, weights, wanted), squares, held)
        if self.lookahead.guesses and not table.missing(layer, experts, counts):
            self._look_ahead(layer, experts)
        if table.add(layer, experts, counts, weights, x, out):
            self.telemetry.computed(layer, len(experts), before)
            self._computed.append((layer, experts, weights, wanted, counts))
            return
        routed = route_token(experts, weights, wanted)
        self._tell_used(layer, routed)
        self.residency.update()
        slices = dict(zip(experts, counts, strict=True))
        waves = self.scheduler.waves(layer, routed, counts)
        look = functools.partial(self._look_ahead, layer, experts)
        bring = functools.partial(self._bring, layer, waves, slices, [(n, 1) for n in counts], look)
        self.experts.sum_token(layer, slices, x, experts, weights, out, bring)

    def _bring(
        self,
        layer: int,
        waves: Iterator[Wave],
        slices: Mapping[int, int],
        tokens: Iterable[tuple[int, int]],
        meanwhile: Callable[[], None] | None,
        compute: Compute,
    ) -> None:
        """Carry out the waves of a layer, and count what they bring."""
        for number, wave in enumerate(waves):
            if number == 0:
                self.telemetry.planned(layer, slices, len(wave.resident), tokens)
            self.waves.run(wave, layer, compute, meanwhile)

    @property
    def horizon(self) -> int:
        """Return for how many layers ahead guesses are wanted now."""
        return self.lookahead.horizon

    def tokens(self, ids: Sequence[int]) -> None:
        """Learn before a pass which tokens it has."""
        self.lookahead.tokens(ids)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Learn before the experts of `layer` are computed what the next layers will probably ask for.

        -1: before all layers, when there is nothing else to read yet.
        """
        self.lookahead.on_router_prediction(layer, guesses)
        if layer < 0:
            self._tell_used()
            self.residency.update()
            self._prefetch(layer, ())

    def slices_ahead(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Sequence[int]:
        """Choose how many slices of experts to prefetch: the base alone where it can be computed with."""
        if self.scheduler.error_budget is not None:
            return [1] * len(experts)
        return self.chooser.one(layer, experts, weights)

    def _look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch what was guessed, now that all that `layer` waits for has been asked for."""
        if not self.lookahead.guesses:  # it is asked once for each wave, and takes them
            return
        self.residency.drop_unwanted(layer, experts)
        self.lookahead.learn(layer, experts)
        self._prefetch(layer, experts)

    def _prefetch(self, layer: int, in_use: Sequence[int]) -> None:
        predictions = self.lookahead.predictions(self.slices_ahead, self.residency.table.missing)
        self.scheduler.pin(layer, in_use)
        self.scheduler.prefetch(predictions)
        self.residency.carry_out()

    def _tell_used(self, layer: int = -1, routed: Sequence[RoutedExpert] = (), tokens: int = 1) -> None:
        """Tell the scheduler what was used: what was computed at once before, then what is computed now, if anything.

        The one way by which it learns of it.
        """
        while self._computed:
            at, experts, weights, wanted, counts = self._computed.popleft()
            self.scheduler.used(at, route_token(experts, weights, wanted))
            self.telemetry.planned(at, dict(zip(experts, counts, strict=True)), len(experts), ((n, 1) for n in counts))
        if routed:
            self.scheduler.used(layer, routed, tokens)
