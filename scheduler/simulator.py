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

from moert.scheduler.cache import SliceCache
from moert.scheduler.capacity import capacities, slice_sizes
from moert.scheduler.cost import Costs, Disk, Read
from moert.scheduler.eviction import POLICIES, Belady, CachePolicy, LeastRecentlyUsed
from moert.scheduler.odds import Odds
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import Chooser, Precision
from moert.scheduler.profile import Profile
from moert.scheduler.replay import Foreteller, chunks, gather, read_precision
from moert.scheduler.trace import DECODE, Trace, TraceStep
from moert.scheduler.types import ExpertKey, Load, Prediction, RoutedExpert, SliceKey, Wave

Asked = tuple[list[RoutedExpert], list[float]]
Progress = Callable[[str], None]
LEAST_ODDS = 0.3  # what is less likely is not prefetched, as in the runtime


@dataclass(frozen=True, slots=True)
class Settings:
    """What is simulated.

    budget: bytes for experts. widths: those of the store. policy: see `POLICIES`. recalls: of the predictor, one
    for each layer ahead; none: nothing is predicted. ahead: bytes of prefetches that may be on their way at a time.
    """

    budget: int
    precision: str
    widths: tuple[int, ...] = (2, 3, 4)
    policy: str = "score"
    recalls: tuple[float, ...] = (0.8,)
    ahead: int = 12 << 20
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Of the tokens decoded.

    hit_ratio: share of the uses of experts that found all slices in memory. stall_share: share of the time in which
    nothing computed. mean_width: bits, over uses of experts. mass_at_width: by width, the share of the router weight
    that was computed at it; 0: left out.
    """

    decode_tokens_per_s: float
    hit_ratio: float
    bytes_read_per_token: float
    bytes_prefetched_per_token: float
    stall_share: float
    mean_width: float
    mass_at_width: dict[int, float]


@dataclass(frozen=True, slots=True)
class Simulation:
    """The run as asked for, and beside it:

    belady: the same widths with evictions that know the future, and no prediction. perfect_prefetch: the same reads,
    all of them known so early that nothing waits but for the disk as a whole. lru: whole experts at the widest width,
    least recently used, nothing computes while something is read.
    """

    settings: Settings
    run: Result
    belady: Result
    perfect_prefetch: Result
    lru: Result


@dataclass(slots=True)
class Totals:
    """Sums over the tokens decoded; seconds and bytes."""

    tokens: int = 0
    computed_s: float = 0.0
    stalled_s: float = 0.0
    reading_s: float = 0.0
    nbytes: int = 0
    prefetched: int = 0
    uses: int = 0
    hits: int = 0
    mass: dict[int, float] = field(default_factory=dict)  # by number of slices
    counts: dict[int, int] = field(default_factory=dict)

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
        )


class Replay:
    """One run through a trace. asks: for each visit of a layer, what is asked of it; then its layer and step.

    overlap: whether anything computes while something is read.
    """

    def __init__(
        self,
        costs: Costs,
        disk: Disk,
        scheduler: Scheduler,
        asks: Callable[[int, Sequence[TraceStep]], Asked],
        predict: Callable[[TraceStep, int], list[Prediction]] | None = None,
        overlap: bool = True,
    ) -> None:
        self.costs, self.disk, self.scheduler = costs, disk, scheduler
        self._asks, self._predict, self._overlap = asks, predict, overlap
        self.visits: list[tuple[int, list[RoutedExpert]]] = []  # what was computed in the end
        self.totals = Totals()
        self.now = 0.0
        self._ahead: dict[Load, Read] = {}

    def run(self, trace: Trace, progress: Progress = lambda text: None) -> Totals:
        decoding = sum(step.phase == DECODE for step in trace.steps)
        for steps in chunks(trace):
            if steps[0].phase == DECODE:
                self._decode(steps[0])
                progress(f"{self.totals.tokens} of {decoding} tokens")
                continue
            self._settle()
            for layer in sorted({layer for step in steps for layer in step.layers}):
                there = [step for step in steps if layer in step.layers]
                self._plan(layer, there)
        return self.totals

    def _settle(self) -> None:
        """All that is on its way arrives."""
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
            totals = self.totals
            totals.uses += len(plan.slices)
            totals.hits += len(plan.waves[0].resident)
            for r in routed:
                n = plan.slices[r.expert]
                totals.mass[n] = totals.mass.get(n, 0.0) + r.weight
                totals.counts[n] = totals.counts.get(n, 0) + 1
        return plan.waves, plan.slices

    def _decode(self, step: TraceStep) -> None:
        totals, disk = self.totals, self.disk
        nbytes, reading = disk.nbytes, disk.busy_until(self.now)
        self._compute(self.costs.token_s)
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
        for number, wave in enumerate(waves):
            self._release(wave.evictions)
            reads = self._hurry(layer, wave.awaited) + [(load, self._submit(load)) for load in wave.loads]
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
        if self._predict is not None:
            busy = [ExpertKey(layer, expert) for expert in wanted]
            prefetch = self.scheduler.prefetch(self._predict(step, layer), busy)
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

    def _hurry(self, layer: int, experts: Sequence[int]) -> list[tuple[Load, Read]]:
        """Prefetches of these experts: from now on somebody waits for them."""
        found = [(load, read) for load, read in self._ahead.items() if load.layer == layer and load.expert in experts]
        for _, read in found:
            self.disk.hurry(self.now, read)
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

    def run(self, settings: Settings, progress: Progress = lambda text: None) -> Simulation:
        """Raises ValueError, with a sentence, for settings that make no sense, such as too little room."""
        trace, widths = self.trace, settings.widths
        precision = read_precision(settings.precision, trace, widths)
        sizes = [slice_sizes(n, widths) for n in trace.expert_bytes]
        try:
            room = capacities(
                settings.budget, [sizes[layer] for layer in self._moe], trace.num_experts, precision.shares(widths)
            )
        except ValueError as error:
            raise ValueError(f"an expert budget of {settings.budget} bytes at {precision} {error}") from None
        costs = Costs(self.profile, sizes, trace.dense_bytes, widths)

        policy = POLICIES[settings.policy](self._moe, trace.num_experts, len(widths))
        chosen = self._asked(settings, precision, sizes, self._scheduler(room, policy, sizes, settings.ahead))
        main = Replay(costs, self._disk(), *chosen)
        totals = main.run(trace, lambda text: progress(f"as asked: {text}"))
        run = totals.result(widths, totals.computed_s + totals.stalled_s)
        perfect = totals.result(widths, max(totals.computed_s, totals.reading_s))

        future = Belady([(layer, {r.expert: r.slices for r in routed}) for layer, routed in main.visits])
        again = _again(main.visits)
        offline = Replay(costs, self._disk(), self._scheduler(room, future, sizes), lambda *_: next(again))
        totals = offline.run(trace, lambda text: progress(f"belady: {text}"))
        belady = totals.result(widths, totals.computed_s + totals.stalled_s)
        # What the run left out is not asked again, but its weight and width count.
        belady = replace(belady, mean_width=run.mean_width, mass_at_width=run.mass_at_width)
        return Simulation(settings, run, belady, perfect, self._baseline(settings, progress))

    def _asked(
        self, settings: Settings, precision: Precision, sizes: Sequence[Sequence[int]], s: Scheduler
    ) -> tuple[
        Scheduler,
        Callable[[int, Sequence[TraceStep]], Asked],
        Callable[[TraceStep, int], list[Prediction]] | None,
    ]:
        """Scheduler, what is asked of it, and what is predicted."""
        kept = {layer: [len(settings.widths)] * self.trace.num_experts for layer in self._moe}
        chooser: Chooser = precision.chooser(settings.widths, kept)
        mean = [sum(column) // len(self._moe) for column in zip(*sizes, strict=True)]
        s.ladder = precision.ladder(settings.widths, kept, mean)
        teller, odds = Foreteller(self.trace, settings.recalls, settings.seed), Odds()

        def asks(layer: int, steps: Sequence[TraceStep]) -> Asked:
            return gather(layer, [step.layers[layer] for step in steps], chooser)

        def predict(step: TraceStep, layer: int) -> list[Prediction]:
            odds.learn(layer, step.layers[layer].experts)
            found: list[Prediction] = []
            for ahead, guess in enumerate(teller.guesses(step, layer)):
                counts = chooser.one(guess.layer, guess.experts, guess.weights)
                if s.ladder is not None:  # the rest is worth reading only where the ladder says so
                    counts = [1] * len(counts)
                ranked = list(enumerate(zip(guess.experts, counts, strict=True)))
                missing = [(rank, e, n) for rank, (e, n) in ranked if s.cache.resident(guess.layer, e) < n]
                odds.watch(ahead, guess.layer, [(rank, e) for rank, e, _ in missing])
                lacking = {rank for rank, _, _ in missing}
                found += [Prediction(guess.layer, e, 1.0, 0) for rank, (e, _) in ranked if rank not in lacking]
                found += [
                    Prediction(guess.layer, e, likely, n)
                    for rank, e, n in missing
                    if (likely := odds.of(ahead, rank)) >= LEAST_ODDS
                ]
            return found

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
    """The same as was computed before."""
    for _, routed in visits:
        yield routed, [0.0] * len(routed)
