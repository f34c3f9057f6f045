"""Host memory and device memory together: where the experts of a layer compute, and what is moved between the two.

`Tiers` drives a `Scheduler` for each of the two memories and joins what they plan. What is moved to the device comes
out of host memory, so it is read into that first. Like `Scheduler` it knows no clock, no file, no thread, and no device
but by what `CostModel` says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from moert.scheduler.assign import CostModel, Resource, Split, Task, all_on_device, gains, split
from moert.scheduler.planner import Scheduler, check
from moert.scheduler.types import ExpertKey, Load, Prediction, Prefetch, RoutedExpert, SliceKey, Wave


@dataclass(frozen=True, slots=True)
class Stage:
    """Part of a plan: what one wave of the host tier brings, and what the device does with it.

    host: evict, load, wait for what is awaited, as in `LayerPlan`. `resident`: experts that the host computes at once;
    of those with loads or awaited it computes what `TieredPlan.host` names, the others are there to be moved. device:
    one after the other, each: evict, begin the moves `loads` (out of host memory, where their slices are before the
    stage or come with its host wave), compute `resident`, compute what is moved or awaited as it arrives. In one memory
    there are no moves: what the host wave loads or awaits for the device is `awaited`.

    Host and device waves of a stage run side by side; the device waves are done before the next stage evicts anything.
    """

    host: Wave
    device: tuple[Wave, ...]


@dataclass(frozen=True, slots=True)
class Division:
    """The division of the experts of one layer of one step between host and device: each computes once, in one place.

    host, device: experts computed there, with their numbers of slices (0, in `host`: left out). hits: how many of them
    need no disk. predicted: seconds that host and device were expected to compute, moves and reads to take. seconds:
    when all was expected to end.
    """

    layer: int
    host: dict[int, int]
    device: dict[int, int]
    hits: int
    predicted: dict[Resource, float]
    seconds: float

    @property
    def slices(self) -> dict[int, int]:
        """Return the slices of all routed experts."""
        return self.host | self.device


@dataclass(frozen=True, slots=True)
class TieredPlan(Division):
    """The plan of one layer of one step: where experts are computed, and in which stages."""

    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class TieredPrefetch:
    """host: from disk to host memory. device: from there to the device."""

    host: Prefetch
    device: Prefetch


_NONE = Prefetch((), ())


@dataclass
class Tiers:
    """device: None where host and device are one memory, which `host` then stands for.

    hybrid: whether the host computes too; without it, the baseline, every expert is computed on the device. `ahead` of
    the device's scheduler bounds the moves on their way that nobody waits for.
    """

    host: Scheduler
    device: Scheduler | None
    cost_model: CostModel
    hybrid: bool = True
    _at_host: list[RoutedExpert] = field(default_factory=list)  # what the host computed in the last plan
    _planned: int = 0  # the layer of the last plan

    def have(self, layer: int, expert: int) -> int:
        """Return how many slices of an expert are in the tier that has more of them, and not on their way any more."""
        found = self.host.cache.there(layer, expert)
        return found if self.device is None else max(found, self.device.cache.there(layer, expert))

    def pin(self, layer: int, experts: Sequence[int]) -> None:
        """Let nothing evict these experts anywhere; those pinned before are not in use any more."""
        self.host.pin(layer, experts)
        if self.device is not None:
            self.device.pin(layer, experts)

    def plan(
        self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1, squares: Sequence[float] = ()
    ) -> TieredPlan:
        """Plan a layer of a step of `tokens` tokens in one go.

        For those whose reads and moves end before the next call. squares: as of `Scheduler.plan`. Raises ValueError as
        that.
        """
        division, stages = self.begin(layer, routed, tokens, squares)
        carried_out = []
        for host, device in stages:
            self.host.done(host)
            waves = []
            for wave in device:
                if self.device is not None:
                    self.device.done(wave)
                waves.append(wave)
            carried_out.append(Stage(host, tuple(waves)))
        self.pin(layer, ())
        d = division
        return TieredPlan(d.layer, d.host, d.device, d.hits, d.predicted, d.seconds, tuple(carried_out))

    def begin(
        self, layer: int, routed: Sequence[RoutedExpert], tokens: int = 1, squares: Sequence[float] = ()
    ) -> tuple[Division, Iterator[tuple[Wave, Iterator[Wave]]]]:
        """Divide a layer of a step of `tokens` tokens, and plan it stage by stage: host wave and device waves of each.

        A stage is planned, and so is each of its device waves, when it is asked for: that is when what was planned
        before it has been carried out.
        """
        check(layer, routed)
        left_out: dict[int, int] = {}
        asked = routed
        if self.host.error_budget is not None and squares:
            have = [self.have(layer, r.expert) for r in routed]
            counts = self.host.choose(layer, routed, squares, have, tokens)
            left_out = {r.expert: 0 for r, n in zip(routed, counts, strict=True) if not n}
            routed = [
                r if n == r.slices else RoutedExpert(r.expert, r.tokens, r.weight, n, r.waiting[:n])
                for r, n in zip(routed, counts, strict=True)
                if n
            ]
        tasks = [self._task(layer, r) for r in routed]
        chosen = self._split(tasks)
        if self.device is not None and self.hybrid:
            chosen = self._fitting(layer, routed, tasks, chosen)
        on_device = set(chosen.device)
        if self.device is None:
            there = frozenset[int]()
        else:
            resident = self.device.cache.resident
            by_device = [r for r in routed if r.expert in on_device]
            there = frozenset(r.expert for r in by_device if resident(layer, r.expert) >= r.slices)
        self._used(layer, asked, there, tokens)
        by_host = [r for r in routed if r.expert not in there]
        hits = len(there) + sum(self.host.cache.there(layer, r.expert) >= r.slices for r in by_host)
        waves = self.host.waves(layer, by_host, [r.slices for r in by_host])
        if self.device is None:
            stages = _in_one_memory(waves, on_device)
        else:
            stages = self._in_two(layer, routed, waves, on_device, there)
        self._planned, self._at_host = layer, [r for r in routed if r.expert not in on_device]
        division = Division(
            layer,
            {r.expert: r.slices for r in self._at_host} | left_out,
            {r.expert: r.slices for r in routed if r.expert in on_device},
            hits + len(left_out),
            _predicted(tasks, on_device, self.cost_model.launch_s),
            chosen.seconds,
        )
        return division, stages

    def at_once(self, layer: int, routed: Sequence[RoutedExpert]) -> float | None:
        """Return, for one token, the seconds that the device takes, where it has all of this and is done before the
        host would be with any of it; else None. Then no split is better, and noting the use, as here, is all there is
        to plan.
        """
        device = self.device
        if device is None or self.host.error_budget is not None:
            return None
        if any(device.cache.resident(layer, r.expert) < r.slices for r in routed):
            return None
        seconds, least = self.cost_model.one_token([r.slices for r in routed])
        if self.hybrid and seconds > least:
            return None
        self._used(layer, routed, {r.expert for r in routed}, 1)
        self.pin(layer, [r.expert for r in routed])
        self._planned, self._at_host = layer, []
        return seconds

    def _used(self, layer: int, asked: Sequence[RoutedExpert], there: Container[int], tokens: int) -> None:
        """Tell both tiers what was asked of a layer. there: experts that the device computes out of what it has: the
        host is not told of them, so that it does not keep them too.
        """
        self.host.used(layer, [r for r in asked if r.expert not in there], tokens)
        if self.device is not None:
            self.device.used(layer, asked, tokens)

    def prefetch(self, predictions: Sequence[Prediction]) -> TieredPrefetch:
        """Choose what to read into host memory and what to move to the device, ahead of the layers to come.

        predictions: layer by layer, of all experts expected with the slices wanted, also of those that host memory has:
        these can be moved. What the device has is not read. Moves go by gain: see `gains`. Behind them what the host
        just computed fills room on the device that is free. Nothing that is pinned is evicted anywhere.
        """
        if self.device is None:
            return TieredPrefetch(self.host.prefetch(predictions), _NONE)
        resident = self.device.cache.resident
        lacking = [p for p in predictions if resident(p.layer, p.expert) < max(p.slices, 1)]
        reads = self.host.prefetch(lacking)
        self.device.protect(predictions)
        keep = {ExpertKey(p.layer, p.expert) for p in predictions}
        evictions: list[SliceKey] = []
        loads: list[Load] = []

        def move(layer: int, expert: int, slices: int, reuse_score: float, gain: float) -> bool:
            assert self.device is not None
            load = Load(layer, expert, resident(layer, expert), slices)
            found = self.device.begin(load, reuse_score, _Lasting(keep, self.host, self.device, gain, self.cost_model))
            if found is not None:
                self._lost(found.evictions)
                evictions.extend(found.evictions)
                loads.append(load)
                keep.add(ExpertKey(layer, expert))
            return found is not None

        for layer, group in groupby(lacking, key=lambda p: p.layer):
            every = [p for p in predictions if p.layer == layer and p.slices]
            self._move_ahead(layer, every, [p for p in group if p.slices], move)
        sizes, device = self.device.cache.sizes(self._planned), self.device.cache
        for r in self._at_host:
            first = resident(self._planned, r.expert)
            fits = all(device.free[index] >= sizes[index] for index in range(first, r.slices))
            if fits and first < r.slices <= self.host.cache.there(self._planned, r.expert):
                move(self._planned, r.expert, r.slices, 0.0, 0.0)
        return TieredPrefetch(reads, Prefetch(tuple(evictions), tuple(loads)))

    def moved(self, load: Load) -> None:
        """A prefetch to the device has been copied."""
        if self.device is not None:
            self.device.arrived(load)

    def _decide(self, tasks: Sequence[Task], launch_s: float, fetch_s: float) -> Split:
        return (split if self.hybrid else all_on_device)(tasks, launch_s, fetch_s)

    def _split(self, tasks: Sequence[Task]) -> Split:
        """Split the tasks. Where the device has all, nothing need be planned, so there the host must save what planning
        takes.
        """
        cost_model = self.cost_model
        found = self._decide(tasks, cost_model.launch_s, cost_model.fetch_s)
        if not found.host or any(t.move_s or t.device_read_s for t in tasks):
            return found
        alone = all_on_device(tasks, cost_model.launch_s, cost_model.fetch_s)
        return found if found.seconds + cost_model.plan_s < alone.seconds else alone

    def _task(self, layer: int, r: RoutedExpert) -> Task:
        """Make the task of an expert. What is on its way counts as there: it will be, before what has not begun."""
        on_host = self.host.cache.resident(layer, r.expert)
        on_device = on_host if self.device is None else self.device.cache.resident(layer, r.expert)
        return self.cost_model.task(r.expert, r.tokens, r.slices, on_device, on_host)

    def _fitting(self, layer: int, routed: Sequence[RoutedExpert], tasks: Sequence[Task], chosen: Split) -> Split:
        """Experts with more slices than the device ever has room for stay on the host."""
        assert self.device is not None
        cache = self.device.cache
        sizes = cache.sizes(layer)
        room = next((n for n, size in enumerate(sizes) if size > cache.capacity[n]), len(sizes))
        large = tuple(r.expert for r in routed if r.slices > room)
        if not large:
            return chosen
        fits = split([t for t in tasks if t.expert not in large], self.cost_model.launch_s, self.cost_model.fetch_s)
        host_s = sum(t.host_s + t.host_read_s for t in tasks if t.expert in large)
        return Split(fits.device, fits.host + large, fits.seconds + host_s)

    def _in_two(
        self,
        layer: int,
        routed: Sequence[RoutedExpert],
        waves: Iterable[Wave],
        on_device: Container[int],
        there: Collection[int],
    ) -> Iterator[tuple[Wave, Iterator[Wave]]]:
        for number, wave in enumerate(waves):
            brought = {*wave.resident, *wave.awaited, *(load.expert for load in wave.loads)}
            if number == 0:
                brought |= set(there)
            group = [r for r in routed if r.expert in on_device and r.expert in brought]
            at_once = tuple([e for e in wave.resident if e not in on_device])
            yield Wave(wave.evictions, wave.loads, at_once, wave.awaited), self._on_device(layer, group)

    def _on_device(self, layer: int, group: Sequence[RoutedExpert]) -> Iterator[Wave]:
        assert self.device is not None
        if group:
            for wave in self.device.waves(layer, group, [r.slices for r in group]):
                self._lost(wave.evictions)
                yield wave

    def _lost(self, evicted: Sequence[SliceKey]) -> None:
        """Tell the host what the device lost: it is worth there what it was to the device, whose uses were not told."""
        assert self.device is not None
        policy = self.device.cache.policy
        for layer, expert, index in evicted:
            if index == 0:
                key = ExpertKey(layer, expert)
                self.host.cache.policy.restore(
                    key, [policy.reuse_score(key, n) for n in range(len(self.host.cache.capacity))]
                )

    def _move_ahead(
        self,
        layer: int,
        predicted: Sequence[Prediction],
        lacking: Sequence[Prediction],
        move: Callable[[int, int, int, float, float], bool],
    ) -> None:
        """Move what of a layer is in host memory, what gains most first, as long as that gains anything."""
        assert self.device is not None
        likely = {p.expert: p.probability for p in lacking if self.host.cache.there(layer, p.expert) >= p.slices}
        tasks = [self._task(layer, RoutedExpert(p.expert, 1, 0.0, p.slices)) for p in predicted]
        slices = {p.expert: p.slices for p in predicted}
        while likely and self.device.spare > 0:
            found = gains(tasks, likely, self.cost_model.launch_s, self.cost_model.fetch_s, self._decide)
            expert = max(found, key=lambda e: (found[e], -e), default=-1)
            if expert < 0 or found[expert] <= 0:
                return
            if move(layer, expert, slices[expert], likely.pop(expert), found[expert]):
                tasks = [t if t.expert != expert else t._replace(move_s=0.0) for t in tasks]


# What the device loses and host memory has not is read from disk when it is wanted next: within so many tokens.
_TOKENS = 10


class _Lasting:
    """The slices that no prefetch to the device evicts: what is kept, and what costs more to lose than the prefetch
    gains.

    In host memory it can be had again; from disk it is read when it is used next.
    """

    def __init__(
        self, keep: Container[ExpertKey], host: Scheduler, device: Scheduler, gain: float, cost_model: CostModel
    ) -> None:
        self._keep, self._host, self._device, self._gain, self._cost_model = (
            keep,
            host.cache,
            device.cache,
            gain,
            cost_model,
        )

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, ExpertKey)
        if key in self._keep:
            return True
        had, there = self._device.resident(*key), self._host.resident(*key)
        if there >= had:
            return False
        task = self._cost_model.task(key.expert, 1, had, had, there)
        return self._device.policy.reuse_score(key, 0) * _TOKENS * task.host_read_s >= self._gain


def _in_one_memory(waves: Iterable[Wave], on_device: Container[int]) -> Iterator[tuple[Wave, Iterator[Wave]]]:
    for wave in waves:
        coming = dict.fromkeys([*wave.awaited, *(load.expert for load in wave.loads)])
        resident = tuple([e for e in wave.resident if e in on_device])
        awaited = tuple([e for e in coming if e in on_device])
        host = Wave(wave.evictions, wave.loads, tuple([e for e in wave.resident if e not in on_device]), wave.awaited)
        yield host, iter((Wave((), (), resident, awaited),) if resident or awaited else ())


def _predicted(tasks: Sequence[Task], on_device: Container[int], launch_s: float) -> dict[Resource, float]:
    there = [t for t in tasks if t.expert in on_device]
    here = [t for t in tasks if t.expert not in on_device]
    return {
        "host": sum(t.host_s for t in here),
        "device": sum(t.device_s for t in there) + (launch_s if there else 0.0),
        "move": sum(t.move_s for t in there),
        "read": sum(t.host_read_s for t in here) + sum(t.device_read_s for t in there),
    }
