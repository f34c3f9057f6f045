"""Discrete events: decoding a recorded trace on a device that is known by its figures.

Drives the same `Scheduler` as the runtime, and does what the runtime does with its plans. A layer of a token: what is
not an expert computes, the layer is planned, demands are submitted, prefetches behind them, experts that are resident
compute, the others as their slices arrive. Prompts warm the cache and the policy's scores, in chunks and without taking
time; all figures are of the tokens decoded.
"""

# L layers, E experts, S slices

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from moert.scheduler.cache import SliceCache
from moert.scheduler.capacity import capacities, slice_sizes
from moert.scheduler.cost import Costs, Disk, Read
from moert.scheduler.eviction import POLICIES, Belady, CachePolicy, LeastRecentlyUsed
from moert.scheduler.lookahead import LookAhead
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Chooser, Precision
from moert.scheduler.profile import Profile
from moert.scheduler.replay import Foreteller, chunks, gather, read_precision
from moert.scheduler.simulation import Result, Settings, Simulation
from moert.scheduler.trace import DECODE, Trace, TraceStep
from moert.scheduler.types import Load, Prediction, RoutedExpert, SliceKey, Wave

Asked = tuple[list[RoutedExpert], list[float]]
Progress = Callable[[str], None]


@dataclass(slots=True)
class Totals:
    """Sums over the tokens decoded; seconds and bytes. prompts: of each chunk of a prompt, tokens, reads and bytes."""

    tokens: int = 0
    computed_s: float = 0.0
    stalled_s: float = 0.0
    reading_s: float = 0.0
    nbytes: int = 0
    prefetched: int = 0
    moved: int = 0
    at_host: int = 0
    uses: int = 0
    hits: int = 0
    mass: dict[int, float] = field(default_factory=dict)  # by number of slices
    counts: dict[int, int] = field(default_factory=dict)
    prompts: list[tuple[int, int, int]] = field(default_factory=list)

    def result(self, widths: Sequence[int], seconds: float) -> Result:
        bits = (0, *widths)
        whole = sum(self.mass.values()) or 1.0
        return Result(
            self.tokens / seconds,
            self.hits / max(self.uses, 1),
            self.nbytes / self.tokens,
            self.prefetched / self.tokens,
            (seconds - self.computed_s) / seconds,
            sum(bits[n] * count for n, count in self.counts.items()) / max(self.uses, 1),
            {bits[n]: self.mass[n] / whole for n in sorted(self.mass)},
            self.moved / self.tokens,
            self.at_host / max(self.uses, 1),
        )


class Replay:
    """One run through a trace. asks: for each visit of a layer, what is asked of it; then its layer and step.

    overlap: whether anything computes while something is read. parts: so many steps of the trace stand for a token,
    each for some of its layers: what comes first in the next one is then predicted at the end of the one before.
    """

    def __init__(
        self,
        costs: Costs,
        disk: Disk,
        scheduler: Scheduler,
        asks: Callable[[int, Sequence[TraceStep]], Asked],
        predict: Callable[[TraceStep, int], list[Prediction]] | None = None,
        overlap: bool = True,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.costs, self.disk, self.scheduler = costs, disk, scheduler
        self._asks, self._predict, self._overlap = asks, predict, overlap
        self.visits: list[tuple[int, list[RoutedExpert]]] = []  # what was computed in the end
        self.totals = Totals()
        self.now = 0.0
        self._ahead: dict[Load, Read] = {}
        self._following: TraceStep | None = None

    def run(self, trace: Trace, progress: Progress = lambda text: None) -> Totals:
        decoding = sum(step.phase == DECODE for step in trace.steps)
        every = [*chunks(trace), ()]
        for steps, behind in pairwise(every):
            if steps[0].phase == DECODE:
                same = (self.totals.tokens + 1) % self.parts and behind and behind[0].phase == DECODE
                self._decode(steps[0], behind[0] if same else None)
                progress(f"{self.totals.tokens} of {decoding} tokens")
                continue
            self._settle()
            loads: list[Load] = []
            for layer in sorted({layer for step in steps for layer in step.layers}):
                waves, _ = self._plan(layer, [step for step in steps if layer in step.layers])
                loads += [load for wave in waves for load in wave.loads]
            self.totals.prompts.append((len(steps), len(loads), sum(map(self.costs.nbytes, loads))))
        return self.totals

    def _settle(self) -> None:
        """Let all that is on its way arrive."""
        for load, read in self._ahead.items():
            self.now = max(self.now, self.disk.wait(read))
            self.scheduler.arrived(load)
        self._ahead.clear()

    def _plan(self, layer: int, steps: Sequence[TraceStep]) -> tuple[tuple[Wave, ...], dict[int, int]]:
        routed, squares = self._asks(layer, steps)
        plan = self.scheduler.plan(layer, routed, len(steps), squares)
        used = [
            r._replace(slices=plan.slices[r.expert], waiting=r.waiting[: plan.slices[r.expert]])
            for r in routed
            if plan.slices[r.expert]
        ]
        self.visits.append((layer, used))
        if steps[0].phase == DECODE:
            self._count(routed, plan.slices, len(plan.waves[0].resident), len(used))
        return plan.waves, plan.slices

    def _count(self, routed: Sequence[RoutedExpert], slices: dict[int, int], hits: int, at_host: int) -> None:
        totals = self.totals
        totals.at_host += at_host
        totals.uses += len(slices)
        totals.hits += hits
        for r in routed:
            n = slices[r.expert]
            totals.mass[n] = totals.mass.get(n, 0.0) + r.weight
            totals.counts[n] = totals.counts.get(n, 0) + 1

    def _decode(self, step: TraceStep, following: TraceStep | None) -> None:
        totals, disk = self.totals, self.disk
        nbytes, reading = disk.nbytes, disk.busy_until(self.now)
        self._compute(self.costs.token_s)
        if self._following is not step:
            self._prefetch(-1, step, ())  # what the token alone says of the first layers
        self._following = following
        for layer, seconds in enumerate(self.costs.dense_s):
            self._compute(seconds)
            if layer in step.layers:
                self._layer(layer, step)
        disk.advance(self.now)
        totals.tokens += 1
        totals.nbytes += disk.nbytes - nbytes
        totals.reading_s += disk.busy_until(self.now) - reading

    def _layer(self, layer: int, step: TraceStep) -> None:
        self.disk.advance(self.now)
        for load in [load for load, read in self._ahead.items() if (read.done or self.now) < self.now]:
            self._arrive(load)
        waves, slices = self._plan(layer, [step])
        if any(wave.loads or wave.awaited for wave in waves):
            self._compute(self.costs.miss_s)
        if self.scheduler.error_budget is not None:
            self._compute(self.costs.ladder_s)
        for number, wave in enumerate(waves):
            self._release(wave.evictions)
            reads = self._promote(layer, wave.awaited) + [(load, self._submit(load)) for load in wave.loads]
            if number == 0:
                self._look_ahead(layer, step)
            self._run(layer, wave, reads, slices)

    def _look_ahead(self, layer: int, step: TraceStep) -> None:
        """Drop prefetches that this layer did not want, and start those of the next layers."""
        wanted = step.layers[layer].experts
        for load in [load for load in self._ahead if load.layer == layer and load.expert not in wanted]:
            if self.disk.cancel(self.now, self._ahead[load]):
                del self._ahead[load]
                self.scheduler.cancel(load)
        self._prefetch(layer, step, wanted)

    def _prefetch(self, layer: int, step: TraceStep, in_use: Sequence[int]) -> None:
        if self._predict is not None:
            self._compute(self.costs.look_s)
            predictions = self._predict(step, layer)
            if self._following is not None and layer == max(step.layers):
                predictions += self._predict(self._following, -1)
            self.scheduler.pin(layer, in_use)
            prefetch = self.scheduler.prefetch(predictions)
            self._release(prefetch.evictions)
            for load in prefetch.loads:
                self._ahead[load] = self._submit(load, ahead=True)
                self.totals.prefetched += self.costs.nbytes(load)

    def _run(self, layer: int, wave: Wave, reads: list[tuple[Load, Read]], slices: dict[int, int]) -> None:
        """Compute the experts of a wave, each once, as soon as it may be."""
        most = len(self.scheduler.cache.capacity)
        there = dict.fromkeys(wave.resident, most)
        there |= {load.expert: load.first for load in reversed(wave.loads) if load.expert not in wave.awaited}
        waiting = {*wave.resident, *wave.awaited, *(load.expert for load in wave.loads)}

        def compute() -> None:
            for e in [e for e in there if e in waiting and slices[e] <= there[e]]:
                waiting.remove(e)
                self._compute(self.costs.expert_s(layer, slices[e]))

        if self._overlap:
            compute()
        while reads:
            self._wait(reads[0][1])
            rest, behind = [], set()
            for load, read in reads:
                if read.done is not None and read.done <= self.now and load.expert not in behind:
                    if load in self._ahead:
                        self._arrive(load)
                    there[load.expert] = load.last
                else:
                    behind.add(load.expert)
                    rest.append((load, read))
            reads = rest
            if self._overlap:
                compute()
        for e in waiting & set(wave.awaited):  # all of it had arrived before
            there[e] = most
        compute()

    def _compute(self, seconds: float) -> None:
        self.now += seconds
        self.totals.computed_s += seconds
        self.disk.advance(self.now)

    def _submit(self, load: Load, ahead: bool = False) -> Read:
        self._compute(self.costs.load_s)
        read = self.disk.submit(self.now, self.costs.nbytes(load), ahead)
        self._compute(self.costs.traffic_s(load))
        return read

    def _wait(self, read: Read) -> None:
        done = self.disk.wait(read)
        if done > self.now:
            self.totals.stalled_s += done - self.now
            self.now = done

    def _arrive(self, load: Load) -> None:
        del self._ahead[load]
        self.scheduler.arrived(load)

    def _promote(self, layer: int, experts: Sequence[int]) -> list[tuple[Load, Read]]:
        """Prefetches of these experts: from now on somebody waits for them."""
        found = [(load, read) for load, read in self._ahead.items() if load.layer == layer and load.expert in experts]
        for _, read in found:
            self.disk.promote(self.now, read)
        return found

    def _release(self, keys: Sequence[SliceKey]) -> None:
        """A prefetch that was about to fill what is evicted is dropped, or waited for if it has begun."""
        for layer, expert, index in keys:
            for load in [load for load in self._ahead if load[:2] == (layer, expert) and load.first <= index]:
                if (layer, expert, load.first) in keys and self.disk.cancel(self.now, self._ahead[load]):
                    del self._ahead[load]
                else:
                    self._wait(self._ahead[load])
                    self._arrive(load)


class Simulator:
    """A trace on a device. Raises ValueError, with a sentence, where the trace decodes nothing."""

    def __init__(self, trace: Trace, profile: Profile) -> None:
        if all(step.phase != DECODE for step in trace.steps):
            raise ValueError(f"the trace of {trace.model} has no step of decoding")
        self.trace, self.profile = trace, profile
        self._moe = [layer for layer, n in enumerate(trace.expert_bytes) if n]

    def prepare(self, settings: Settings) -> Replay:
        """The run as asked for, ready to go. Raises as `run`."""
        trace, widths = self.trace, settings.widths
        precision = read_precision(settings.precision, trace, widths, settings.router)
        sizes = self._sizes(settings)
        try:
            room = capacities(
                settings.budget, [sizes[layer] for layer in self._moe], trace.num_experts, precision.shares(widths)
            )
        except ValueError as error:
            raise ValueError(f"an expert budget of {settings.budget} bytes at {precision} {error}") from None
        policy = POLICIES[settings.policy](self._moe, trace.num_experts, len(widths))
        chosen = self._asked(settings, precision, sizes, self._scheduler(room, policy, sizes, settings.ahead))
        return Replay(Costs(self.profile, sizes, trace.dense_bytes, widths), self._disk(), *chosen)

    def run(self, settings: Settings, progress: Progress = lambda text: None) -> Simulation:
        """Raises ValueError, with a sentence, for settings that make no sense, such as too little room."""
        trace, widths, main = self.trace, settings.widths, self.prepare(settings)
        totals = main.run(trace, lambda text: progress(f"as asked: {text}"))
        run = totals.result(widths, totals.computed_s + totals.stalled_s)
        perfect = totals.result(widths, max(totals.computed_s, totals.reading_s))

        future = Belady([(layer, {r.expert: r.slices for r in routed}) for layer, routed in main.visits])
        again, cache = _again(main.visits), main.scheduler.cache
        scheduler = self._scheduler(cache.capacity, future, self._sizes(settings))
        totals = Replay(main.costs, self._disk(), scheduler, lambda *_: next(again)).run(
            trace, lambda text: progress(f"belady: {text}")
        )
        belady = totals.result(widths, totals.computed_s + totals.stalled_s)
        # What the run left out is not asked again, but its weight and width count.
        belady = replace(belady, mean_width=run.mean_width, mass_at_width=run.mass_at_width)
        return Simulation(settings, run, belady, perfect, self._baseline(settings, progress))

    def _sizes(self, settings: Settings) -> list[tuple[int, ...]]:
        """[L, S]"""
        whole = self.trace.expert_bytes
        return [(settings.sizes if n else ()) or slice_sizes(n, settings.widths) for n in whole]

    def _asked(
        self,
        settings: Settings,
        precision: Precision,
        sizes: Sequence[Sequence[int]],
        s: Scheduler,
        cache: SliceCache | None = None,
    ) -> tuple[
        Scheduler,
        Callable[[int, Sequence[TraceStep]], Asked],
        Callable[[TraceStep, int], list[Prediction]] | None,
    ]:
        """Scheduler, what is asked of it, and what is predicted: of what lacks in `cache`, its own if none is given."""
        cache = cache or s.cache
        kept = {layer: [len(settings.widths)] * self.trace.num_experts for layer in self._moe}
        chooser: Chooser = precision.chooser(settings.widths, kept)
        mean = [sum(column) // len(self._moe) for column in zip(*sizes, strict=True)]
        s.error_budget = precision.error_budget(settings.widths, kept, mean)
        teller = Foreteller(self.trace, settings.recalls, settings.seed)
        ahead = LookAhead((len(settings.recalls),), share=1.0)  # as many are named as are used

        def asks(layer: int, steps: Sequence[TraceStep]) -> Asked:
            return gather(layer, [step.layers[layer] for step in steps], chooser)

        def wanted(layer: int, experts: Sequence[int], weights: Sequence[float]) -> Sequence[int]:
            if s.error_budget is not None:  # the rest is worth reading only where the error budget says so
                return [1] * len(experts)
            return chooser.one(layer, experts, weights)

        def missing(layer: int, experts: Sequence[int], counts: Sequence[int]) -> list[int]:
            return [i for i, (e, n) in enumerate(zip(experts, counts, strict=True)) if cache.resident(layer, e) < n]

        def predict(step: TraceStep, layer: int) -> list[Prediction]:
            if layer >= 0:
                ahead.learn(layer, step.layers[layer].experts)
            ahead.on_router_prediction(layer, teller.guesses(step, layer))
            return ahead.predictions(wanted, missing)

        return s, asks, predict if settings.recalls else None

    def _baseline(self, settings: Settings, progress: Progress) -> Result:
        trace, widest = self.trace, settings.widths[-1:]
        sizes = [(n,) for n in trace.expert_bytes]
        largest = max(trace.expert_bytes)
        if settings.budget < largest:
            raise ValueError(f"an expert budget of {settings.budget} bytes holds no whole expert of {largest}")
        chooser = read_precision(f"fixed:{widest[0]}", trace, widest).chooser(
            widest, {layer: [1] * trace.num_experts for layer in self._moe}
        )
        replay = Replay(
            Costs(self.profile, sizes, trace.dense_bytes, widest),
            self._disk(),
            self._scheduler((settings.budget,), LeastRecentlyUsed(), sizes),
            lambda layer, steps: gather(layer, [step.layers[layer] for step in steps], chooser),
            overlap=False,
        )
        totals = replay.run(trace, lambda text: progress(f"lru: {text}"))
        return totals.result(widest, totals.computed_s + totals.stalled_s)

    def _scheduler(
        self, room: Sequence[int], policy: CachePolicy, sizes: Sequence[Sequence[int]], ahead: int = 0
    ) -> Scheduler:
        return Scheduler(SliceCache(room, policy, dict(enumerate(sizes))), ahead=ahead)

    def _disk(self) -> Disk:
        profile = self.profile
        return Disk(profile.disk_bytes_per_s, profile.disk_latency_s, profile.disk_chunk_bytes)


def _again(visits: Sequence[tuple[int, list[RoutedExpert]]]) -> Iterator[Asked]:
    """Yield the same requests as were computed before."""
    for _, routed in visits:
        yield routed, [0.0] * len(routed)
