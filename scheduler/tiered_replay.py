"""Discrete events with a device beside the host: `simulator` for two tiers, driving the same `Tiers` as the runtime.

A layer of a token: what is not an expert computes on the device; the layer is planned; demands go to the disk, moves to
the link as their slices come; device and host compute side by side, each what is there first. Copies go one after the
other in the order in which they were begun. Where host and device are one memory, both together never read it faster
than it is. Prompts warm both tiers, as in `simulator`.
"""

# L layers, E experts, S slices

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from moert.scheduler.assign import CostModel
from moert.scheduler.cache import SliceCache
from moert.scheduler.capacity import capacities
from moert.scheduler.cost import Costs, Disk, Read
from moert.scheduler.eviction import POLICIES
from moert.scheduler.planner import Scheduler
from moert.scheduler.profile import Profile
from moert.scheduler.replay import read_precision
from moert.scheduler.simulation import Result, Settings, TieredSimulation
from moert.scheduler.simulator import Asked, Progress, Replay, Simulator
from moert.scheduler.tiers import Stage, TieredPlan, Tiers
from moert.scheduler.trace import DECODE, Trace, TraceStep
from moert.scheduler.types import ExpertKey, Load, Prediction, Wave


class DeviceCosts(Costs):
    """Times with a device, which computes what is not an expert, always.

    launch_s: before it computes what it is asked. latency_s: until a copy moves, or a result is there. plan_s: for each
    layer of which not all is on the device. Raises ValueError for a profile that has no figures of a GPU.
    """

    def __init__(
        self,
        profile: Profile,
        sizes: Sequence[Sequence[int]],
        dense_bytes: Sequence[int],
        widths: Sequence[int],
        cost_model: CostModel,
    ) -> None:
        super().__init__(profile, sizes, dense_bytes, widths)
        self.dense_s = [profile.layer_overhead_s + n * profile.gpu_expert_cost(8) for n in dense_bytes]
        rates = [profile.gpu_expert_cost(width) for width in widths]
        self._device_s = [[total * rate for total, rate in zip(accumulate(row), rates, strict=False)] for row in sizes]
        self._cost_model, self.launch_s, self.latency_s = cost_model, cost_model.launch_s, cost_model.move_s(0)
        self.plan_s, self.bytes_per_s = cost_model.plan_s, profile.memory_bytes_per_s

    def device_s(self, layer: int, slices: int) -> float:
        """Time to compute an expert of so many slices on the device, once they are there."""
        return self._device_s[layer][slices - 1]

    def copy_s(self, load: Load) -> float:
        return self._cost_model.move_s(self.nbytes(load))


class TieredReplay(Replay):
    """One run through a trace with two tiers."""

    costs: DeviceCosts

    def __init__(
        self,
        costs: DeviceCosts,
        disk: Disk,
        tiers: Tiers,
        asks: Callable[[int, Sequence[TraceStep]], Asked],
        predict: Callable[[TraceStep, int], list[Prediction]] | None = None,
    ) -> None:
        super().__init__(costs, disk, tiers.host, asks, predict)
        self._tiers = tiers
        self._plans: list[TieredPlan] = []
        self._moving: dict[Load, float] = {}  # prefetches to the device, and when they will be there
        self._link = self._device = 0.0  # when the last copy ends, and what the device was given to compute

    def _settle(self) -> None:
        super()._settle()
        self.now = max([self.now, *self._moving.values()])
        self._land()

    def _land(self) -> None:
        for load in [load for load, done in self._moving.items() if done <= self.now]:
            del self._moving[load]
            self._tiers.moved(load)

    def _plan(self, layer: int, steps: Sequence[TraceStep]) -> tuple[tuple[Wave, ...], dict[int, int]]:
        routed, squares = self._asks(layer, steps)
        plan = self._tiers.plan(layer, routed, len(steps), squares)
        if steps[0].phase == DECODE:
            first = plan.stages[0]
            at_once = len(first.host.resident) + sum(len(wave.resident) for wave in first.device[:1])
            self._count(routed, plan.slices, at_once, sum(n > 0 for n in plan.host.values()))
        self._plans = [plan]
        return tuple([stage.host for stage in plan.stages]), plan.slices

    def _layer(self, layer: int, step: TraceStep) -> None:
        self.disk.advance(self.now)
        for load in [load for load, read in self._ahead.items() if (read.done or self.now) < self.now]:
            self._arrive(load)
        self._land()
        waves, _ = self._plan(layer, [step])
        plan = self._plans.pop()
        if any(wave.loads or wave.awaited for wave in waves):
            self._compute(self.costs.miss_s)
        elif plan.host or any(wave.loads or wave.awaited for wave in plan.stages[0].device):
            self._compute(self.costs.plan_s)
        if self.scheduler.error_budget is not None:
            self._compute(self.costs.ladder_s)
        for number, stage in enumerate(plan.stages):
            self._release(stage.host.evictions)
            reads = self._promote(layer, stage.host.awaited)
            reads += [(load, self._submit(load)) for load in stage.host.loads]
            begun, waiting = self.now, {load.expert for load, _ in reads}
            first = stage.device[0].loads if stage.device else ()
            moves = {load: self._move(load, begun) for load in first if load.expert not in waiting}
            if number == 0:
                self._look_ahead(layer, step)
            self._stage(layer, stage, plan, reads, begun, moves)

    def _move(self, load: Load, since: float) -> float:
        """Begin a copy, behind those begun before, and not before `since`; returns when it ends."""
        self._link = max(self._link, since) + self.costs.copy_s(load)
        self.totals.moved += self.costs.nbytes(load)
        return self._link

    def _stage(
        self,
        layer: int,
        stage: Stage,
        plan: TieredPlan,
        reads: Sequence[tuple[Load, Read]],
        begun: float,
        moves: dict[Load, float],
    ) -> None:
        """Host and device side by side. begun: when the device was told what to compute, before the look ahead; moves:
        those begun then, and when they end."""
        costs, came = self.costs, dict[int, float]()
        for load, read in reads:
            came[load.expert] = max(came.get(load.expert, 0.0), self.disk.wait(read))
        busy = self._device_waves(layer, stage.device, plan, came, begun, moves)
        host = self.now
        coming = sorted((e for e in came if plan.host.get(e)), key=came.__getitem__)
        if stage.host.resident or coming:
            host += costs.latency_s
            for e in [*stage.host.resident, *coming]:
                begin = max(host, came.get(e, 0.0))
                host = begin + costs.expert_s(layer, plan.host[e])
                busy.append((begin, host))
            host += costs.latency_s
        end = max(self.now, host, *came.values()) if came else max(self.now, host)
        end = max(end, self._device if stage.device else 0.0, self._enough(layer, plan, begun))
        computed = _covered(busy, self.now, end)
        self.totals.computed_s += computed
        self.totals.stalled_s += end - self.now - computed
        self.now = end
        self.disk.advance(end)
        for load, _ in reads:
            if load in self._ahead:
                self._arrive(load)

    def _device_waves(
        self,
        layer: int,
        waves: Sequence[Wave],
        plan: TieredPlan,
        came: dict[int, float],
        begun: float,
        moves: dict[Load, float],
    ) -> list[tuple[float, float]]:
        """Return what the device computes, from when to when."""
        costs, busy = self.costs, list[tuple[float, float]]()

        def compute(experts: Sequence[int], ready: float) -> None:
            begin = max(self._device, ready + costs.launch_s)
            self._device = begin + sum(costs.device_s(layer, plan.device[e]) for e in experts)
            busy.append((begin, self._device))

        for number, wave in enumerate(waves):
            start = begun if number == 0 else max(begun, self._device)  # room is free when what was there is computed
            if wave.resident:
                compute(wave.resident, begun)
            there = {e: came.get(e, start) for e in wave.awaited}
            for load in [load for load in self._moving if load.layer == layer and load.expert in wave.awaited]:
                there[load.expert] = max(there[load.expert], self._moving.pop(load))
                self._tiers.moved(load)
            for load in sorted(wave.loads, key=lambda load: came.get(load.expert, 0.0)):
                done = moves.get(load) or self._move(load, max(start, came.get(load.expert, 0.0)))
                there[load.expert] = max(there.get(load.expert, 0.0), done)
            for e in sorted(there, key=there.__getitem__):
                compute([e], there[e])
        return busy

    def _enough(self, layer: int, plan: TieredPlan, begun: float) -> float:
        """Return when, in one memory, all that is computed can have been read from it."""
        if self._tiers.device is not None:
            return 0.0
        nbytes = sum(sum(self.costs.sizes[layer][:n]) for n in plan.slices.values())
        return begun + nbytes / self.costs.bytes_per_s / len(plan.stages)

    def _prefetch(self, layer: int, step: TraceStep, in_use: Sequence[int]) -> None:
        predictions: list[Prediction] = []
        if self._predict is not None:
            self._compute(self.costs.look_s)
            predictions = self._predict(step, layer)
            if self._following is not None and layer == max(step.layers):
                predictions += self._predict(self._following, -1)
        self._tiers.pin(layer, in_use)
        prefetch = self._tiers.prefetch(predictions)
        self._release(prefetch.host.evictions)
        for load in prefetch.host.loads:
            self._ahead[load] = self._submit(load, ahead=True)
            self.totals.prefetched += self.costs.nbytes(load)
        for load in prefetch.device.loads:
            self._moving[load] = self._move(load, self.now)


def _covered(spans: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """Return how much of a time lies in at least one of the spans."""
    total, at = 0.0, since
    for begin, end in sorted(spans):
        if min(end, until) > at:
            total += min(end, until) - max(begin, at)
            at = min(end, until)
    return total


class TieredSimulator(Simulator):
    """A trace on a device beside a host. Raises ValueError as `Simulator`, and where the profile knows no GPU."""

    def __init__(self, trace: Trace, profile: Profile) -> None:
        super().__init__(trace, profile)
        if profile.gpu_expert_s_per_byte is None:
            raise ValueError(f"{profile.name} has no figures of a GPU that computes experts")
        self._unified = bool(profile.gpu_integrated)

    def compare(self, settings: Settings, progress: Progress = lambda text: None) -> TieredSimulation:
        """Raises as `Simulator.run`."""
        sizes = self._sizes(settings)
        everything = self.trace.num_experts * sum(map(sum, sizes))

        def run(name: str, changed: Settings, full: bool = False) -> Result:
            replay = self.prepare(changed) if changed.device_budget is None else self.tiered(changed, full)
            totals = replay.run(self.trace, lambda text: progress(f"{name}: {text}"))
            return totals.result(settings.widths, totals.computed_s + totals.stalled_s)

        whole = replace(settings, hybrid=False, device_budget=everything)
        return TieredSimulation(
            settings,
            run("as asked", settings),
            run("device alone", replace(settings, hybrid=False)),
            run("host alone", replace(settings, device_budget=None)),
            run("all resident", replace(whole, budget=everything) if self._unified else whole, full=True),
        )

    def tiered(self, settings: Settings, full: bool = False) -> TieredReplay:
        """The run as asked for, ready to go. full: everything is on the device, which must have the room."""
        trace, widths = self.trace, settings.widths
        precision = read_precision(settings.precision, trace, widths, settings.router)
        sizes = self._sizes(settings)

        def scheduler(budget: int, of: str) -> Scheduler:
            rows = [sizes[layer] for layer in self._moe]
            try:
                room = capacities(budget, rows, trace.num_experts, precision.shares(widths))
                if full:
                    room = tuple(trace.num_experts * sum(column) for column in zip(*rows, strict=True))
            except ValueError as error:
                raise ValueError(f"{of} budget of {budget} bytes at {precision} {error}") from None
            policy = POLICIES[settings.policy](self._moe, trace.num_experts, len(widths))
            made = Scheduler(SliceCache(room, policy, dict(enumerate(sizes))), ahead=settings.ahead)
            for layer in self._moe if full else ():
                for e in range(trace.num_experts):
                    made.cache.insert(ExpertKey(layer, e), len(widths), ())
            return made

        mean = [sum(column) // len(self._moe) for column in zip(*(sizes[layer] for layer in self._moe), strict=True)]
        cost_model = CostModel(self.profile, widths, mean, self._unified)
        assert settings.device_budget is not None
        device = None if self._unified else scheduler(settings.device_budget, "a device")
        host = scheduler(settings.budget, "an expert")
        tiers = Tiers(host, device, cost_model, settings.hybrid)
        _, asks, predict = self._asked(settings, precision, sizes, host, (device or host).cache)
        costs = DeviceCosts(self.profile, sizes, trace.dense_bytes, widths, cost_model)
        return TieredReplay(costs, self._disk(), tiers, asks, predict)
