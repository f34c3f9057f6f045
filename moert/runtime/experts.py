"""Executes plans: the experts of one layer, from routing to their weighted sum."""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moert.quant.format import ExpertLayout
from moert.quant.matmul import PackedExpert, experts_ffn
from moert.quant.rows import combine
from moert.runtime.residency import Arena
from moert.runtime.telemetry import Counters
from moert.runtime.transfer import Read, SliceReader
from moert.scheduler.cache import SliceCache
from moert.scheduler.planner import plan_layer
from moert.scheduler.precision import FixedPrecision
from moert.scheduler.types import ExpertKey, Load, Plan, RoutedExpert, SliceKey, Wave
from moert.store.reader import Store


@dataclass(slots=True)
class _Step:
    """One layer of one step on its way.

    places: for each expert, where it stands in the flattened [T, K] indices; None for a single token, of which decoding
    would make eight tensors a layer. parts: float32 [T * K, D], filled from the front, `filled` rows so far. computed:
    the experts that they come from.
    """

    plan: Plan
    x: Tensor
    places: dict[int, Tensor] | None
    parts: Tensor
    filled: int = 0
    computed: list[int] = field(default_factory=list)


class ExpertRunner:
    """Computes routed experts out of the arena, and reads what is missing. Not safe to call from two threads."""

    def __init__(self, store: Store, slots: Sequence[int], precision: FixedPrecision, activation: str) -> None:
        self._store = store
        self._layout: ExpertLayout = store.layout
        self._arena = Arena(slots, store.layout.slice_sizes)
        self._cache = SliceCache(slots)
        self._reader = SliceReader()
        self._precision = precision
        self._slices = precision.slices(store.layout.widths)
        self._activation = activation
        self._ready: dict[tuple[int, int, int], PackedExpert] = {}  # by layer, expert and number of slices
        self._checked: set[SliceKey] = set()  # a checksum is verified when a slice is read for the first time
        self._parts = torch.empty(0)
        self.counters = Counters()

    def use(self, precision: FixedPrecision) -> None:
        """Compute at another precision from the next call on; its slices must have slots."""
        self._precision = precision
        self._slices = precision.slices(self._layout.widths)

    def close(self) -> None:
        self._reader.close()

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the routed experts.

        x: float32 [T, D]. indices: int64 [T, K], no expert twice in a row. weights: float32 [T, K].
        Returns float32 [T, D]. Raises StoreError where an expert cannot be read.
        """
        T, K = indices.shape
        places: dict[int, Tensor] | None = None
        if T == 1:
            chosen = indices.view(-1).tolist()
            routed = [
                RoutedExpert(e, 1, w, self._slices) for e, w in zip(chosen, weights.view(-1).tolist(), strict=True)
            ]
        else:
            places, sums = _places_by_expert(indices), _weight_by_expert(indices, weights)
            routed = [RoutedExpert(e, at.shape[0], sums[e], self._slices) for e, at in places.items()]
        loading: set[SliceKey] = set()
        try:
            plan = plan_layer(layer, routed, self._cache)
            self._count(plan, routed)
            step = _Step(plan, x, places, self._room(T * K, x.shape[1]))
            for wave in plan.waves:
                self._run_wave(step, wave, loading)
        except BaseException:  # Ctrl-C too, wherever it strikes
            self._recover(loading)
            raise
        # The contributions stand in the order in which they were computed; they are added in the order of their rank,
        # so that the result does not depend on what was in memory.
        if places is None:
            return combine(step.parts, torch.tensor([step.computed.index(e) for e in chosen]), weights)
        order = torch.cat([places[e] for e in step.computed])
        return combine(step.parts, torch.empty_like(order).scatter_(0, order, torch.arange(T * K)), weights)

    def _room(self, rows: int, size: int) -> Tensor:
        """Float32 [rows, size], valid until the next call: kept, because new pages cost more than what is written."""
        if self._parts.numel() < rows * size:
            self._parts = torch.empty(rows * size)
        return self._parts[: rows * size].view(rows, size)

    def _run_wave(self, step: _Step, wave: Wave, loading: set[SliceKey]) -> None:
        """`loading` has the slices whose slots are not filled yet, at every moment."""
        layer = step.plan.layer
        for key in wave.evictions:
            self._release(key)
        reads: dict[Load, Read] = {}
        for load in wave.loads:
            keys = [SliceKey(layer, load.expert, index) for index in range(load.first, load.last)]
            loading.update(keys)
            reads[load] = self._start(load, keys)
        if wave.resident:
            self._compute(step, wave.resident)
        waiting = list(wave.loads)
        while waiting:
            before = time.perf_counter()
            reads[waiting[0]].wait()
            self.counters.waited_s += time.perf_counter() - before
            ready = [load for load in waiting if reads[load].done]
            for load in ready:
                reads[load].wait()
                keys = [SliceKey(layer, load.expert, index) for index in range(load.first, load.last)]
                self._checked.update(keys)
                loading.difference_update(keys)
            waiting = [load for load in waiting if load not in ready]
            self._compute(step, [load.expert for load in ready])

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
        self.counters.reads += 1
        self.counters.bytes_read += sum(len(b) for b in read.buffers)
        return read

    def _packed(self, layer: int, expert: int, slices: int) -> PackedExpert:
        """The expert, used with its first `slices` slices: built once, kept until one of them is evicted."""
        found = self._ready.get((layer, expert, slices))
        if found is None:
            views = [self._arena.view(SliceKey(layer, expert, index)) for index in range(slices)]
            found = self._ready[layer, expert, slices] = PackedExpert.from_slices(views, self._layout)
        return found

    def _compute(self, step: _Step, experts: Sequence[int]) -> None:
        before = time.perf_counter()
        layer, slices = step.plan.layer, step.plan.slices
        packed = [self._packed(layer, e, slices[e]) for e in experts]
        tokens_of, rows = None, len(experts)
        if step.places is not None:
            K = step.parts.shape[0] // step.x.shape[0]
            tokens_of = [step.places[e] // K for e in experts]
            rows = sum(tokens.shape[0] for tokens in tokens_of)
        experts_ffn(step.x, packed, tokens_of, step.parts[step.filled : step.filled + rows], self._activation)
        step.computed += experts
        step.filled += rows
        self.counters.computed_s += time.perf_counter() - before

    def _release(self, key: SliceKey) -> None:
        self._arena.release(key)
        for slices in range(key.slice + 1, self._layout.num_slices + 1):
            self._ready.pop((key.layer, key.expert, slices), None)

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
        self._cache = SliceCache(self._cache.slots, type(self._cache.policy)())
        for expert, count in prefixes.items():
            self._cache.insert(expert, count, ())

    def _count(self, plan: Plan, routed: Sequence[RoutedExpert]) -> None:
        resident = plan.waves[0].resident
        self.counters.expert_uses += len(plan.slices)
        self.counters.expert_hits += len(resident)
        self.counters.width_sum += sum(self._layout.widths[count - 1] for count in plan.slices.values())
        for expert in routed:
            self.counters.token_uses[plan.slices[expert.expert]] += expert.tokens


def _places_by_expert(indices: Tensor) -> dict[int, Tensor]:
    """Positions in the flattened [T, K] indices at which each expert stands, ascending."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat)
    experts = counts.nonzero().flatten()
    return dict(zip(experts.tolist(), torch.split(order, counts[experts].tolist()), strict=True))


def _weight_by_expert(indices: Tensor, weights: Tensor) -> dict[int, float]:
    flat = indices.flatten()
    sums = torch.zeros(int(flat.max()) + 1).index_add_(0, flat, weights.flatten())
    return dict(enumerate(sums.tolist()))
