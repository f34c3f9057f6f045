"""Computes routed experts on a device and on the host's cores at once, as a plan of both tiers says.

The text does not depend on where an expert computes beyond the rounding of float32 sums.
"""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moert.device.backend import Copy, Device
from moert.device.tier import DeviceTier, DeviceWork, Entries, Moves
from moert.quant.expert_table import ExpertTable
from moert.runtime.executor import ExpertRunner, More, Policies
from moert.runtime.routing import route_token, route_tokens, sums_by_expert
from moert.scheduler.assign import CostModel
from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES
from moert.scheduler.hebf import ORDERS
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Precision
from moert.scheduler.predictor import Predictor
from moert.scheduler.tiers import TieredPlan, Tiers
from moert.scheduler.types import ExpertKey, LayerPlan, Load, SliceKey
from moert.store.reader import Store

_AHEAD_BYTES = 16 << 20  # moves on their way that nobody waits for: what a link takes while a few layers compute


class HybridRunner(ExpertRunner):
    """An `ExpertRunner` with a device. x may lie on the host or on the device, and so does what it makes of it.

    slots: of the host's arena; device_slots: of the device's, None where both have one memory. pace: what computing,
    moving and reading take. hybrid: whether the host computes too (False: everything on the device).
    Raises DeviceError where the device cannot be used for these experts.
    """

    def __init__(
        self,
        store: Store,
        slots: Sequence[int],
        precision: Precision,
        activation: str,
        policies: Policies | None = None,
        predictor: Predictor | None = None,
        *,
        device: Device,
        device_slots: Sequence[int] | None,
        cost_model: CostModel,
        hybrid: bool = True,
    ) -> None:
        self._device, self._device_slots, self._cost_model, self._hybrid = device, device_slots, cost_model, hybrid
        super().__init__(store, slots, precision, activation, policies, predictor)
        try:
            self._tier = DeviceTier(device, device_slots, store.layout, activation, self._loader.arena, self.telemetry)
        except BaseException:
            self._loader.close()
            raise
        self._loader.leaving = self._tier.settle
        self._tiers = self._new_tiers()
        self._moving: list[tuple[Load, list[tuple[SliceKey, Copy]]]] = []  # ahead of being wanted
        self._now: tuple[TieredPlan, DeviceWork] | None = None  # the layer that is computed

    def prepare(self) -> None:
        """Compile what the device computes with, which takes seconds the first time."""
        with self._device.guard():
            self._tier.prepare()

    @contextmanager
    def begin(self, decoding: bool, count: int, first: int | None = None) -> Iterator[None]:
        with self._device.guard(), super().begin(decoding, count, first):
            yield

    def _new_tiers(self) -> Tiers:
        device = None
        if self._device_slots is not None:
            kept, sizes = self._store.kept, self._layout.slice_sizes
            policy = POLICIES[self._policies.cache](list(kept), max(map(len, kept.values())), len(sizes))
            capacity = [n * size for n, size in zip(self._device_slots, sizes, strict=True)]
            cache = SliceCache(capacity, policy, dict.fromkeys(kept, sizes))
            device = Scheduler(cache, ORDERS[self._policies.order], ahead=_AHEAD_BYTES)
        return Tiers(self._scheduler, device, self._cost_model, self._hybrid)

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if len(x) == 1:  # with a list for each token it is faster
            out = torch.zeros_like(x)
            self.forward_token(layer, x, indices[0].tolist(), weights[0].tolist(), out)
            return out
        self.telemetry.reached(layer)
        self.foresight.pause()
        counts = torch.from_numpy(self._chooser.many(layer, indices.numpy(), weights.numpy()))
        places, routed = route_tokens(indices, weights, counts)
        squares: list[float] = []
        if self._scheduler.error_budget is not None:
            sums = sums_by_expert(indices, weights.square())
            squares = [sums[e] for e in places]
        K, flat = indices.shape[1], weights.flatten()
        try:
            self._learn()
            plan = self._tiers.plan(layer, routed, len(x), squares)
            tokens = [(min(n, plan.slices[e]), len(at)) for e, groups in places.items() for n, at in groups.items()]
            self._note(plan, tokens)
            entries = {
                e: [(min(n, most), at // K, flat[at]) for n, at in places[e].items()] for e, most in plan.device.items()
            }
            return self._compute_both(plan, x, entries, lambda *of: self._run(of[0], of[1], places, weights, of[2]))
        except BaseException:  # Ctrl-C too, wherever it strikes
            self._recover()
            raise

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
        self.telemetry.reached(layer)
        if layer == self._first_layer:
            self.foresight.step(time.perf_counter())
        wanted = self._chooser.one(layer, experts, weights)
        squares = [] if self._scheduler.error_budget is None else [w * w for w in weights]
        try:
            self._learn()
            routed = route_token(experts, weights, wanted)
            weight_of = dict(zip(experts, torch.split(torch.tensor(weights), 1), strict=True))
            seconds = self._tiers.at_once(layer, routed)
            if seconds is not None:
                entries = {r.expert: [(r.slices, _FIRST, weight_of[r.expert])] for r in routed}
                out += self._compute_at_once(layer, x, entries, seconds)
                return
            plan = self._tiers.plan(layer, routed, 1, squares)
            self._note(plan, [(n, 1) for n in plan.slices.values()])
            entries = {e: [(n, _FIRST, weight_of[e])] for e, n in plan.device.items()}
            guessed = bool(self.foresight.guesses)

            def run(host: LayerPlan, x: Tensor, more: More) -> Tensor:
                sums = torch.zeros(x.shape)
                self._run_one(host, x, experts, weights, sums, more)
                return sums

            out += self._compute_both(plan, x, entries, run)
            if plan.host and not guessed:  # what the host computed may be worth a place on the device
                self._prefetch([ExpertKey(layer, e) for e in experts])
        except BaseException:
            self._recover()
            raise

    def _learn(self) -> None:
        """What has arrived, and what computing and moving took."""
        self._arrived()
        for what, predicted, seconds in self._tier.measured():
            self._cost_model.measured(what, predicted, seconds)

    def _note(self, plan: TieredPlan, tokens: list[tuple[int, int]]) -> None:
        """Count what is planned; a hit needs no disk."""
        missing = {load.expert for stage in plan.stages for load in stage.host.loads}
        missing |= {e for stage in plan.stages for e in stage.host.awaited}
        self.telemetry.planned(plan.layer, plan.slices, len(plan.slices) - len(missing), tokens)
        self.telemetry.of(plan.layer).device_uses += len(plan.device)

    def _part(self, layer: int, x: Tensor, entries: Entries) -> tuple[DeviceWork, bool]:
        """The device's part, and whether x lies there."""
        device, there = self._device, x.device == self._device.torch_device
        sent = x if there or not entries else device.send(x)
        return DeviceWork(layer, sent, torch.zeros_like(sent, dtype=device.sum_dtype), entries), there

    def _compute_at_once(self, layer: int, x: Tensor, entries: Entries, seconds: float) -> Tensor:
        """What the device makes of x [1, D] out of what it has."""
        slices = {e: n for e, [(n, _, _)] in entries.items()}
        part, there = self._part(layer, x, entries)
        self._tier.launch(part, list(entries))
        if self.foresight.guesses:
            self._look_ahead(layer, list(slices))
        self._tier.watch(part, seconds, 0.0)
        self.telemetry.planned(layer, slices, len(slices), ((n, 1) for n in slices.values()))
        self.telemetry.of(layer).device_uses += len(slices)
        return (part.out if there else self._device.fetch(part.out)).float()

    def _compute_both(
        self, plan: TieredPlan, x: Tensor, entries: Entries, run: Callable[[LayerPlan, Tensor, More], Tensor]
    ) -> Tensor:
        """What both sides make of x [T, D], where it lies. run: the host's side, which has a plan of its own."""
        device, (part, there) = self._device, self._part(plan.layer, x, entries)
        slices = dict.fromkeys(plan.device, 0) | plan.host
        host = LayerPlan(plan.layer, slices, tuple(stage.host for stage in plan.stages))
        self._now = plan, part
        works = any(plan.host.values()) or not there

        def more() -> Tensor | None:
            self._tier.watch(part, plan.predicted["device"], plan.predicted["move"])
            return device.fetch(part.out).double() if works and plan.device else None

        sums = run(host, device.fetch(x) if there and works else x, more)
        self._now = None
        if there:
            return device.send(sums) if works else part.out.float()
        return sums

    def _waves(
        self, plan: LayerPlan, compute: Callable[[dict[int, int]], None], meanwhile: Callable[[], None] | None = None
    ) -> None:
        assert self._now is not None
        tiered, part = self._now
        held = functools.partial(_held, self._loader.table, plan.layer)
        began = self.telemetry.of(plan.layer).computed_s
        for stage in tiered.stages:
            moves = Moves(self._tier, part, stage.device)
            moves.advance(held)  # what the device has computes while the host does

            def use(ready: dict[int, int], moves: Moves = moves) -> None:
                moves.advance(held)
                compute({e: n for e, n in ready.items() if tiered.host.get(e)})

            self._loader.run(stage.host, plan.layer, use, meanwhile)
            moves.advance(held)
            assert moves.done
        if any(tiered.host.values()):
            self._cost_model.measured(
                "host", tiered.predicted["host"], self.telemetry.of(plan.layer).computed_s - began
            )

    def _arrived(self) -> None:
        super()._arrived()
        moving, self._moving = self._moving, []
        for load, copies in moving:
            if all(copy.done for _, copy in copies):
                self._tiers.moved(load)
            else:
                self._moving.append((load, copies))

    def _prefetch(self, busy: Sequence[ExpertKey]) -> None:
        predictions = self.foresight.predictions(self._foreseen_slices, self._far)
        ahead = self._tiers.prefetch(predictions, busy)
        self._tier.release(ahead.device.evictions)
        self._moving += [(load, self._tier.move(load)) for load in ahead.device.loads]
        self._loader.release(ahead.host.evictions)
        for load in ahead.host.loads:
            self._loader.start(load, ahead=True)

    def _far(self, layer: int, experts: Sequence[int], slices: Sequence[int]) -> list[int]:
        """Positions in `experts` of those that the device cannot compute at once with so many slices."""
        cache = (self._tiers.device or self._scheduler).cache
        return [i for i, (e, n) in enumerate(zip(experts, slices, strict=True)) if cache.resident(layer, e) < n]

    def routing_bias(self, layer: int, choices: int) -> Tensor | None:
        found = super().routing_bias(layer, choices)
        device = self._tiers.device
        if found is None or device is None:
            return found
        held = torch.tensor([device.cache.resident(layer, e) > 0 for e in range(len(found))])
        return torch.where(held, self._precision.route, found)

    def preload(self) -> None:
        """Read all experts, if the host's arena holds all of them, and move all, if the device's does."""
        super().preload()
        if self._device_slots is None or not (self._holds_all(self._slots) and self._holds_all(self._device_slots)):
            return
        tiers = Tiers(self._scheduler, self._tiers.device, self._cost_model, hybrid=False)
        nothing = torch.empty(0)
        try:
            for layer, routed in self._all().items():
                held = functools.partial(_held, self._loader.table, layer)
                for stage in tiers.plan(layer, routed).stages:
                    Moves(self._tier, DeviceWork(layer, nothing, nothing, {}), stage.device).advance(held)
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        self._now = None
        self._moving.clear()
        try:
            self._tier.restart()
        finally:  # a lost device leaves no reads on their way
            super()._recover()
            self._tiers = self._new_tiers()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._tier.close()


_FIRST = torch.zeros(1, dtype=torch.int64)


def _held(table: ExpertTable, layer: int, expert: int) -> int:
    return table.held(layer, [expert])[0]
