"""Executes plans: the experts of one layer, from routing to their weighted sum."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from moert.quant.format import MAX_WIDTH, ExpertLayout
from moert.quant.matmul import ExpertTable, PackedExpert, experts_ffn
from moert.quant.rows import combine
from moert.runtime.residency import Arena
from moert.runtime.telemetry import Counters
from moert.runtime.transfer import Read, SliceReader
from moert.scheduler.cache import SliceCache
from moert.scheduler.planner import plan_layer
from moert.scheduler.precision import Precision
from moert.scheduler.types import ExpertKey, Load, Plan, RoutedExpert, SliceKey, Wave
from moert.store.reader import Store

_Places: TypeAlias = dict[int, dict[int, Tensor]]


@dataclass(slots=True)
class _Step:
    """One layer of one step on its way.

    places: for each expert and each number of slices that it is used with, where it stands in the flattened [T, K]
    indices. parts: float32 [T * K, D], filled from the front, `filled` rows so far. computed: the places of these rows.
    """

    plan: Plan
    x: Tensor
    places: _Places
    parts: Tensor
    filled: int = 0
    computed: list[Tensor] = field(default_factory=list)


class ExpertRunner:
    """Computes routed experts out of the arena, and reads what is missing. Not safe to call from two threads."""

    def __init__(self, store: Store, slots: Sequence[int], precision: Precision, activation: str) -> None:
        self._store = store
        self._layout: ExpertLayout = store.layout
        self._arena = Arena(slots, store.layout.slice_sizes)
        self._cache = SliceCache(slots)
        self._reader = SliceReader()
        self._activation = activation
        self._ready: dict[tuple[int, int, int], PackedExpert] = {}  # by layer, expert and number of slices
        self._checked: set[SliceKey] = set()  # a checksum is verified when a slice is read for the first time
        self._parts = torch.empty(0)
        self._table = ExpertTable(activation)
        # layer, experts, weights and slices
        self._unplanned: deque[tuple[int, Sequence[int], Sequence[float], Sequence[int]]] = deque()
        self._counters = Counters()
        self.use(precision)

    @property
    def counters(self) -> Counters:
        """Up to date when it is asked for."""
        self._catch_up()
        return self._counters

    def use(self, precision: Precision) -> None:
        """Compute at another precision from the next call on; its slices must have slots.

        An expert that the store has fewer slices of is computed with all that it has.
        """
        self._catch_up()
        self._precision, self._chooser = precision, precision.chooser(self._layout.widths, self._store.kept)

    def preload(self) -> None:
        """Read all experts, if the arena holds all of them at the width in use; else nothing happens."""
        shares = self._precision.shares(self._layout.widths)
        most = {layer: [min(n, len(shares)) for n in kept] for layer, kept in self._store.kept.items()}
        needed = [sum(n > i for counts in most.values() for n in counts) for i in range(len(shares))]
        if any(slots < count for slots, count in zip(self._cache.slots, needed, strict=False)):
            return
        # The numbers of slices that will be asked for, so that decoding finds all of them ready.
        counts = [
            n for n, (share, wider) in enumerate(zip(shares, [*shares[1:], 0.0], strict=True), 1) if share > wider
        ]
        loading: set[SliceKey] = set()
        try:
            for layer, slices in most.items():
                plan = plan_layer(layer, [RoutedExpert(e, 1, 0.0, n) for e, n in enumerate(slices)], self._cache)
                for wave in plan.waves:
                    self._run_wave(layer, wave, loading, functools.partial(self._prepare, layer, slices, counts))
        except BaseException:
            self._recover(loading)
            raise

    def close(self) -> None:
        self._reader.close()

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the routed experts.

        x: float32 [T, D]. indices: int64 [T, K], no expert twice in a row. weights: float32 [T, K].
        Returns float32 [T, D]. Raises StoreError where an expert cannot be read.
        """
        self._catch_up()
        counts = torch.from_numpy(self._chooser.many(layer, indices.numpy(), weights.numpy()))
        places, sums = _places_by_expert(indices, counts), _weight_by_expert(indices, weights)
        routed = [
            RoutedExpert(e, sum(at.shape[0] for at in groups.values()), sums[e], max(groups))
            for e, groups in places.items()
        ]
        loading: set[SliceKey] = set()
        try:
            plan = plan_layer(layer, routed, self._cache)
            self._count(plan, ((n, at.shape[0]) for groups in places.values() for n, at in groups.items()))
            return self._run(plan, x, places, weights, loading)
        except BaseException:  # Ctrl-C too, wherever it strikes
            self._recover(loading)
            raise

    def add_one(self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor) -> None:
        """The same for a single token, added to `out`: x and out float32 contiguous [1, D].

        What decoding calls. Where all experts are in memory, their plan is to compute them, so they are computed at
        once; it is made later, for several layers at a time, while Python's own data are in the processor's caches.
        """
        before = time.perf_counter()
        counts = self._chooser.one(layer, experts, weights)
        if self._table.add(layer, experts, counts, weights, x, out):
            self._counters.computed_s += time.perf_counter() - before
            self._unplanned.append((layer, experts, weights, counts))
            return
        self._catch_up()
        loading: set[SliceKey] = set()
        try:
            plan = self._plan_one(layer, experts, weights, counts)
            places = {e: {n: torch.tensor([k])} for k, (e, n) in enumerate(zip(experts, counts, strict=True))}
            out += self._run(plan, x, places, torch.tensor([weights]), loading)
        except BaseException:
            self._recover(loading)
            raise

    def _catch_up(self) -> None:
        """Plan the layers that were computed without a plan: nothing is loaded, but the cache learns of the use."""
        while self._unplanned:
            self._plan_one(*self._unplanned.popleft())

    def _plan_one(self, layer: int, experts: Sequence[int], weights: Sequence[float], counts: Sequence[int]) -> Plan:
        """Plan what the router asks for a single token."""
        routed = [RoutedExpert(e, 1, w, n) for e, w, n in zip(experts, weights, counts, strict=True)]
        plan = plan_layer(layer, routed, self._cache)
        self._count(plan, ((n, 1) for n in counts))
        return plan

    def _run(self, plan: Plan, x: Tensor, places: _Places, weights: Tensor, loading: set[SliceKey]) -> Tensor:
        """Wave by wave. `loading` has the slices whose slots are not filled yet, at every moment."""
        step = _Step(plan, x, places, self._room(weights.numel(), x.shape[1]))
        for wave in plan.waves:
            self._run_wave(plan.layer, wave, loading, functools.partial(self._compute, step))
        # The contributions stand in the order in which they were computed; they are added in the order of their rank,
        # so that the result does not depend on what was in memory.
        order = torch.cat(step.computed)
        return combine(step.parts, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))), weights)

    def _room(self, rows: int, size: int) -> Tensor:
        """Float32 [rows, size], valid until the next call: kept, because new pages cost more than what is written."""
        if self._parts.numel() < rows * size:
            self._parts = torch.empty(rows * size)
        return self._parts[: rows * size].view(rows, size)

    def _run_wave(self, layer: int, wave: Wave, loading: set[SliceKey], use: Callable[[Sequence[int]], object]) -> None:
        """Load what the wave says; `use` gets the experts that are there, at first those that were."""
        for key in wave.evictions:
            self._release(key)
        reads: dict[Load, Read] = {}
        for load in wave.loads:
            keys = [SliceKey(layer, load.expert, index) for index in range(load.first, load.last)]
            loading.update(keys)
            reads[load] = self._start(load, keys)
        if wave.resident:
            use(wave.resident)
        waiting = list(wave.loads)
        while waiting:
            before = time.perf_counter()
            reads[waiting[0]].wait()
            self._counters.waited_s += time.perf_counter() - before
            ready = [load for load in waiting if reads[load].done]
            for load in ready:
                reads[load].wait()
                keys = [SliceKey(layer, load.expert, index) for index in range(load.first, load.last)]
                self._checked.update(keys)
                loading.difference_update(keys)
            waiting = [load for load in waiting if load not in ready]
            use([load.expert for load in ready])

    def _start(self, load: Load, keys: Sequence[SliceKey]) -> Read:
        for key in keys:
            self._arena.take(key)
        location = self._store.location(keys[0].layer, load.expert)
        read = Read(
            location.file,
            location.offset + sum(self._layout.slice_sizes[: load.first]),
            [self._arena.buffer(key) for key in keys],
            [None if key in self._checked else self._store.checksum(*key) for key in keys],
            f"expert {load.expert} of layer {keys[0].layer}",
        )
        self._reader.submit(read)
        self._counters.reads += 1
        self._counters.bytes_read += sum(len(b) for b in read.buffers)
        return read

    def _packed(self, layer: int, expert: int, slices: int) -> PackedExpert:
        """The expert, used with its first `slices` slices: built once, kept until one of them is evicted."""
        found = self._ready.get((layer, expert, slices))
        if found is None:
            views = [self._arena.view(SliceKey(layer, expert, index)) for index in range(slices)]
            found = self._ready[layer, expert, slices] = PackedExpert.from_slices(views, self._layout)
            self._table.put(layer, expert, slices, found)
        return found

    def _prepare(self, layer: int, slices: Sequence[int], counts: Sequence[int], experts: Sequence[int]) -> None:
        for e in experts:
            for n in counts:
                self._packed(layer, e, min(n, slices[e]))

    def _compute(self, step: _Step, experts: Sequence[int]) -> None:
        before = time.perf_counter()
        groups = [(e, n, at) for e in experts for n, at in step.places[e].items()]
        packed = [self._packed(step.plan.layer, e, n) for e, n, _ in groups]
        K = step.parts.shape[0] // step.x.shape[0]
        tokens_of = [at // K for _, _, at in groups]
        rows = sum(tokens.shape[0] for tokens in tokens_of)
        experts_ffn(step.x, packed, tokens_of, step.parts[step.filled : step.filled + rows], self._activation)
        step.computed += (at for _, _, at in groups)
        step.filled += rows
        self._counters.computed_s += time.perf_counter() - before

    def _release(self, key: SliceKey) -> None:
        self._arena.release(key)
        for slices in range(key.slice + 1, self._layout.num_slices + 1):
            if self._ready.pop((key.layer, key.expert, slices), None) is not None:
                self._table.drop(key.layer, key.expert, slices)

    def _recover(self, loading: set[SliceKey]) -> None:
        """Begin afresh with what is surely in the arena, after a step that broke off somewhere.

        The cache may be anywhere between two states, so it is made anew from the slots that are filled.
        """
        self._reader.drain()
        self._arena.rebuild()
        held = self._arena.held() - loading
        prefixes: dict[ExpertKey, int] = {}
        for key in sorted(held):
            expert = ExpertKey(key.layer, key.expert)
            if key.slice == prefixes.get(expert, 0):
                prefixes[expert] = key.slice + 1
        for key in self._arena.held():
            if key in loading or key.slice >= prefixes.get(ExpertKey(key.layer, key.expert), 0):
                self._arena.release(key)
        self._ready.clear()
        self._table, self._unplanned = ExpertTable(self._activation), deque()
        self._cache = SliceCache(self._cache.slots, type(self._cache.policy)())
        for expert, count in prefixes.items():
            self._cache.insert(expert, count, ())

    def _count(self, plan: Plan, tokens: Iterable[tuple[int, int]]) -> None:
        """tokens: how many (token, expert) there are with so many slices."""
        counters, widths = self._counters, self._layout.widths
        counters.expert_uses += len(plan.slices)
        counters.expert_hits += len(plan.waves[0].resident)
        for n in plan.slices.values():
            counters.width_sum += widths[n - 1]
        for n, count in tokens:
            counters.token_uses[n] += count


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


def _weight_by_expert(indices: Tensor, weights: Tensor) -> dict[int, float]:
    flat = indices.flatten()
    sums = torch.zeros(int(flat.max()) + 1).index_add_(0, flat, weights.flatten())
    return dict(enumerate(sums.tolist()))
