"""Computes routed experts on a device and on the host's cores at once, as a plan of both tiers says.

The text does not depend on where an expert computes beyond the rounding of float32 sums.
"""

# T tokens, K experts per token, D hidden

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from moert.device.backend import Device
from moert.device.tier import DeviceTier, DeviceWork, Entries, Moves
from moert.quant.expert_table import ExpertTable
from moert.runtime.executor import ExpertRunner, Policies
from moert.runtime.host import Bring, More
from moert.runtime.routing import route_token
from moert.runtime.telemetry import Counters, Telemetry
from moert.runtime.waves import Compute
from moert.scheduler.assign import CostModel
from moert.scheduler.hebf import ORDERS
from moert.scheduler.lookahead import LookAhead
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Precision
from moert.scheduler.predictor import Predictor
from moert.scheduler.tiers import Division, Tiers
from moert.scheduler.types import RouterPrediction, Wave
from moert.scheduler.warm import Memory
from moert.store.reader import Store

_AHEAD_BYTES = 16 << 20  # moves on their way that nobody waits for: what a link takes while a few layers compute

Stages: TypeAlias = Iterator[tuple[Wave, Iterator[Wave]]]  # for each, the host's wave, and those of the device


class HybridRunner:
    """Computes what an `ExpertRunner` does, on a device and on the host; the host's side is an `ExpertRunner`.

    x may lie on the host or on the device, and so does what it makes of it. slots: of the host's arena; device_slots:
    of the device's, None where both have one memory. cost_model: what computing, moving and reading take. hybrid:
    whether the host computes too (False: everything on the device). Raises DeviceError where the device cannot be used
    for these experts.
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
        self._device, self._device_slots, self._cost_model = device, device_slots, cost_model
        self._slots = tuple(slots)
        policies = policies or Policies()
        self.host = host = ExpertRunner(store, slots, precision, activation, policies, predictor)
        self.telemetry: Telemetry = host.telemetry
        self.lookahead: LookAhead = host.lookahead
        self._residency = host.residency
        try:
            scheduler, cache = None, None
            if device_slots is not None:
                cache = policies.new_cache(store, device_slots)
                scheduler = Scheduler(cache, ORDERS[policies.order], ahead=_AHEAD_BYTES)
            arena = self._residency.arena
            self._tier = DeviceTier(device, device_slots, store.layout, activation, arena, self.telemetry, cache)
        except BaseException:
            host.close()
            raise
        self._residency.before_reuse = self._tier.settle
        self._tiers = Tiers(host.scheduler, scheduler, cost_model, hybrid)
        self._first_layer = min(store.kept)

    def prepare(self) -> None:
        """Compile what the device computes with, which takes seconds the first time."""
        with self._device.guard():
            self._tier.prepare()

    @property
    def counters(self) -> Counters:
        """Return what was counted, up to date."""
        return self.host.counters

    def layer_counters(self, decoding: bool) -> dict[int, Counters]:
        """Return what was counted for each layer, of decoding or of prompts."""
        return self.host.layer_counters(decoding)

    @contextmanager
    def begin(self, decoding: bool, count: int, first: int | None = None) -> Iterator[None]:
        """Enter a pass, as `ExpertRunner.begin`."""
        with self._device.guard(), self.host.begin(decoding, count, first):
            yield

    def use(self, precision: Precision) -> None:
        """Compute at another precision from the next call on; its slices must have slots."""
        self.host.use(precision)

    def remember(self) -> Memory:
        """Say what the host's arena holds, for a later run."""
        return self.host.remember()

    def warm(self, memory: Memory) -> int:
        """Read what another run held into the empty arena of the host; returns the bytes read."""
        return self.host.warm(memory)

    @property
    def horizon(self) -> int:
        """Return for how many layers ahead guesses are wanted now."""
        return self.lookahead.horizon

    def tokens(self, ids: Sequence[int]) -> None:
        """Learn before a pass which tokens it has."""
        self.lookahead.tokens(ids)

    def on_router_prediction(self, layer: int, guesses: Sequence[RouterPrediction]) -> None:
        """Learn before the experts of `layer` are computed what the next layers will probably ask for."""
        self.lookahead.on_router_prediction(layer, guesses)
        if layer < 0:
            self._update()
            self._prefetch(layer, ())

    def routing_bias(self, layer: int, choices: int) -> Tensor | None:
        """Return the bias [E] that favours experts in the memory of either; None as `ExpertRunner.routing_bias`."""
        found = self.host.routing_bias(layer, choices)
        device = self._tiers.device
        if found is None or device is None:
            return found
        held = torch.tensor([device.cache.resident(layer, e) > 0 for e in range(len(found))])
        return torch.where(held, self.host.precision.route, found)

    def __call__(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Compute the weighted sum of the routed experts, as `ExpertRunner` does it."""
        if len(x) == 1:  # with a list for each token it is faster
            out = torch.zeros_like(x)
            self.forward_token(layer, x, indices[0].tolist(), weights[0].tolist(), out)
            return out
        self.telemetry.reached(layer)
        self.lookahead.pause()
        places, routed, squares = self.host.ask(layer, indices, weights)
        self._update()
        division, stages = self._tiers.begin(layer, routed, len(x), squares)
        slices = division.slices
        self._note(division, [(min(n, slices[e]), len(at)) for e, groups in places.items() for n, at in groups.items()])
        K, flat = indices.shape[1], weights.flatten()
        entries = {
            e: [(min(n, most), at // K, flat[at]) for n, at in places[e].items()] for e, most in division.device.items()
        }

        def on_host(x: Tensor, bring: Bring, more: More) -> Tensor:
            return self.host.experts.sum_tokens(layer, self._host_slices(division), x, places, weights, bring, more)

        return self._compute_both(division, stages, x, entries, on_host, lambda: None)

    def forward_token(
        self, layer: int, x: Tensor, experts: Sequence[int], weights: Sequence[float], out: Tensor
    ) -> None:
        """Add the weighted sum of a single token to `out`, as `ExpertRunner` does it."""
        self.telemetry.reached(layer)
        if layer == self._first_layer:
            self.lookahead.step(time.perf_counter())
        wanted = self.host.chooser.one(layer, experts, weights)
        squares = [] if self.host.scheduler.error_budget is None else [w * w for w in weights]
        self._update()
        routed = route_token(experts, weights, wanted)
        weight_of = dict(zip(experts, torch.split(torch.tensor(weights), 1), strict=True))
        seconds = self._tiers.at_once(layer, routed)
        if seconds is not None:
            entries = {r.expert: [(r.slices, _FIRST, weight_of[r.expert])] for r in routed}
            out += self._compute_at_once(layer, x, entries, seconds)
            return
        division, stages = self._tiers.begin(layer, routed, 1, squares)
        self._note(division, [(n, 1) for n in division.slices.values()])
        entries = {e: [(n, _FIRST, weight_of[e])] for e, n in division.device.items()}
        guessed = bool(self.lookahead.guesses)

        def on_host(x: Tensor, bring: Bring, more: More) -> Tensor:
            sums = torch.zeros(x.shape)
            slices = self._host_slices(division)
            self.host.experts.sum_token(layer, slices, x, experts, weights, sums, bring, more)
            return sums

        look = functools.partial(self._look_ahead, layer, experts)
        out += self._compute_both(division, stages, x, entries, on_host, look)
        if division.host and not guessed:  # what the host computed may be worth a place on the device
            self._prefetch(layer, experts)

    def _update(self) -> None:
        """Take note of what has arrived, and of what computing and moving took."""
        self._residency.update()
        self._tier.update()
        for what, predicted, seconds in self._tier.measured():
            self._cost_model.measured(what, predicted, seconds)

    def _note(self, division: Division, tokens: list[tuple[int, int]]) -> None:
        """Count what is planned."""
        self.telemetry.planned(division.layer, division.slices, division.hits, tokens)
        self.telemetry.of(division.layer).device_uses += len(division.device)

    @staticmethod
    def _host_slices(division: Division) -> dict[int, int]:
        """Return with how many slices the host computes each expert; 0: it does not."""
        return dict.fromkeys(division.device, 0) | division.host

    def _work(self, layer: int, x: Tensor, entries: Entries) -> tuple[DeviceWork, bool]:
        """Return the device's work, and whether x lies there."""
        device, there = self._device, x.device == self._device.torch_device
        sent = x if there or not entries else device.send(x)
        return DeviceWork(layer, sent, torch.zeros_like(sent, dtype=device.sum_dtype), entries), there

    def _compute_at_once(self, layer: int, x: Tensor, entries: Entries, seconds: float) -> Tensor:
        """Return what the device makes of x [1, D] out of what it has."""
        slices = {e: n for e, [(n, _, _)] in entries.items()}
        work, there = self._work(layer, x, entries)
        self._tier.launch(work, list(entries))
        self._look_ahead(layer, list(slices))
        self._tier.watch(work, seconds, 0.0)
        self.telemetry.planned(layer, slices, len(slices), ((n, 1) for n in slices.values()))
        self.telemetry.of(layer).device_uses += len(slices)
        return (work.out if there else self._device.fetch(work.out)).float()

    def _compute_both(
        self,
        division: Division,
        stages: Stages,
        x: Tensor,
        entries: Entries,
        on_host: Callable[[Tensor, Bring, More], Tensor],
        meanwhile: Callable[[], None],
    ) -> Tensor:
        """Return what both sides make of x [T, D], where it lies. on_host: the host's side, given what is brought."""
        device, (work, there) = self._device, self._work(division.layer, x, entries)
        host_computes = any(division.host.values()) or not there

        def more() -> Tensor | None:
            self._tier.watch(work, division.predicted["device"], division.predicted["move"])
            return device.fetch(work.out).double() if host_computes and division.device else None

        bring = functools.partial(self._bring, division, stages, work, meanwhile)
        sums = on_host(device.fetch(x) if there and host_computes else x, bring, more)
        if there:
            return device.send(sums) if host_computes else work.out.float()
        return sums

    def _bring(
        self, division: Division, stages: Stages, work: DeviceWork, meanwhile: Callable[[], None], compute: Compute
    ) -> None:
        """Carry out the stages of a plan, the device beside the host, for which `compute` computes."""
        layer, table, by_host = division.layer, self._residency.table, division.host
        began = self.telemetry.of(layer).computed_s
        for host_wave, device_waves in stages:
            moves = Moves(self._tier, work, device_waves, functools.partial(_held, table, layer))
            moves.advance()  # what the device has computes while the host does

            def use(ready: dict[int, int], moves: Moves = moves) -> None:
                moves.advance()
                compute({e: n for e, n in ready.items() if by_host.get(e)})

            self.host.waves.run(host_wave, layer, use, meanwhile)
            moves.advance()
            assert moves.done
        if any(by_host.values()):
            seconds = self.telemetry.of(layer).computed_s - began
            self._cost_model.measured("host", division.predicted["host"], seconds)

    def _look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch what was guessed, now that all that `layer` waits for has been asked for."""
        if not self.lookahead.guesses:  # it is asked once for each stage, and takes them
            return
        self._residency.drop_unwanted(layer, experts)
        self.lookahead.learn(layer, experts)
        self._prefetch(layer, experts)

    def _prefetch(self, layer: int, in_use: Sequence[int]) -> None:
        predictions = self.lookahead.predictions(self.host.slices_ahead, self._far)
        self._tiers.pin(layer, in_use)
        found = self._tiers.prefetch(predictions)
        self._tier.let_go()
        for load in found.device.loads:
            self._tier.move(load, ahead=True)
        self._residency.carry_out()

    def _far(self, layer: int, experts: Sequence[int], slices: Sequence[int]) -> list[int]:
        """Positions in `experts` of those that the device cannot compute at once with so many slices."""
        cache = (self._tiers.device or self._tiers.host).cache
        return [i for i, (e, n) in enumerate(zip(experts, slices, strict=True)) if cache.resident(layer, e) < n]

    def preload(self, before_layer: Callable[[], None] = lambda: None) -> None:
        """Read all experts, if the host's arena holds all of them, and move all, if the device's does.

        before_layer: called before each layer is read; may raise, to read no more.
        """
        self.host.preload(before_layer)
        slots, host = self._device_slots, self.host
        if slots is None or not (host.holds_all(self._slots) and host.holds_all(slots)):
            return
        tiers = Tiers(self._tiers.host, self._tiers.device, self._cost_model, hybrid=False)
        nothing = torch.empty(0)
        for layer, routed in host.every_expert().items():
            self._update()
            division, stages = tiers.begin(layer, routed)
            self._bring(division, stages, DeviceWork(layer, nothing, nothing, {}), lambda: None, lambda ready: None)

    def close(self) -> None:
        """End the reading threads, and give the device's memory back."""
        try:
            self.host.close()
        finally:
            self._tier.close()


_FIRST = torch.zeros(1, dtype=torch.int64)


def _held(table: ExpertTable, layer: int, expert: int) -> int:
    return table.held(layer, [expert])[0]
