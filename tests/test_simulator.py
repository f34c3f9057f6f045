"""The simulator, against timelines and optima that are worked out by hand or by trying everything."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.cache import SliceCache
from moert.scheduler.capacity import capacities, slice_sizes, slots_for
from moert.scheduler.cost import Costs, Disk
from moert.scheduler.eviction import POLICIES, Belady, RecentScore
from moert.scheduler.planner import Scheduler
from moert.scheduler.profile import Profile
from moert.scheduler.replay import Foreteller, chunks, read_precision
from moert.scheduler.simulation import Settings
from moert.scheduler.simulator import Replay, Simulator
from moert.scheduler.trace import DECODE, PREFILL, Routing, Trace, TraceStep, draw_trace
from moert.scheduler.types import ExpertKey, Load, Prediction, RoutedExpert

# 1 s to read or compute what is easily counted: a dense layer takes 1 s, a byte of an expert 1/100 s, of a read 1/10 s.
DEVICE = Profile(
    name="d",
    description="d",
    date="2026-11-22",
    disk_bytes_per_s=10.0,
    disk_latency_s=0.5,
    disk_chunk_bytes=10.0,
    disk_direct=True,
    memory_bytes=1e9,
    memory_bytes_per_s=1e15,
    library_bytes=1.0,
    expert_s_per_byte={2: 0.01, 3: 0.01, 4: 0.01},
    dense_s_per_byte=0.1,
    prefill_macs_per_s={4: 1.0},
    dense_prefill_macs_per_s=1.0,
    attention_macs_per_s=1.0,
    token_overhead_s=0.0,
    layer_overhead_s=0.0,
    miss_overhead_s=0.0,
    load_overhead_s=0.0,
)


def step(*layers, phase=DECODE):
    """One token; each layer: expert and weight pairs."""
    routings = {
        n: Routing(tuple(e for e, _ in pairs), tuple(w for _, w in pairs)) for n, pairs in enumerate(layers) if pairs
    }
    return TraceStep(phase, routings)


def trace_of(*steps, experts=4, nbytes=100):
    layers = max(max(s.layers) for s in steps) + 1
    top_k = max(len(r.experts) for s in steps for r in s.layers.values())
    return Trace("t", layers, experts, top_k, (nbytes,) * layers, (10,) * layers, steps)


def simulate(trace, budget, precision="fixed:4", device=DEVICE, **options):
    return Simulator(trace, device).run(Settings(budget, precision, recalls=(), **options))


def test_one_expert_after_the_other_by_hand():
    """Two layers with an expert each of 100 bytes, room for one: everything is read, every time.

    Dense 1 s, latency 0.5 s, reading 10 s, computing 1 s: 12.5 s a layer, of which 10.5 s nothing computes.
    """
    trace = trace_of(step([(0, 1.0)], [(0, 1.0)]), step([(0, 1.0)], [(0, 1.0)]))
    result = simulate(trace, 100)
    assert result.run.decode_tokens_per_s == pytest.approx(1 / 25)
    assert result.run.stall_share == pytest.approx(10.5 / 12.5)
    assert result.run.bytes_read_per_token == 200
    assert result.run.hit_ratio == 0
    assert result.run.mean_width == 4
    assert result.run.mass_at_width == {4: 1.0}
    assert result.lru == dataclasses.replace(result.run)
    assert result.perfect_prefetch.decode_tokens_per_s == pytest.approx(1 / 20)  # reading alone, latencies hidden
    # With one slot, and what is asked for read always, knowing the future is of no use.
    assert result.belady == result.run


def test_what_is_resident_computes_while_the_rest_is_read():
    """Experts 0 and 1 in turn, then both: one hit computes during the read of the other; without overlap it cannot."""
    trace = trace_of(step([(0, 0.5), (1, 0.5)], phase=PREFILL), step([(0, 0.6), (2, 0.4)]))
    result = simulate(trace, 200)
    # Score: 0 and 1 are alike, 0 is kept because it is wanted. Dense 1, then max(compute 1, latency + read 10.5), 1.
    assert result.run.decode_tokens_per_s == pytest.approx(1 / 12.5)
    assert result.run.stall_share == pytest.approx(9.5 / 12.5)
    assert result.run.hit_ratio == 0.5
    assert result.lru.decode_tokens_per_s == pytest.approx(1 / 13.5)


def test_experts_compute_as_they_arrive():
    """Two reads of 10 s, the heavier one first: it computes while the other is read. Latencies overlap."""
    trace = trace_of(step([(0, 0.3), (1, 0.7)]))
    assert simulate(trace, 200).run.decode_tokens_per_s == pytest.approx(1 / (1 + 0.5 + 10 + 10 + 1))
    slow = dataclasses.replace(DEVICE, expert_s_per_byte={4: 0.2})
    # Now computing takes 20 s: the second expert has arrived long before the first is done.
    assert simulate(trace, 200, device=slow).run.decode_tokens_per_s == pytest.approx(1 / (1 + 0.5 + 10 + 20 + 20))


def test_widths_decide_what_is_read_and_computed():
    """Slices of 50, 25 and 25 of 100 bytes; routed: the lighter expert gets fewer."""
    assert slice_sizes(4800, (2, 3, 4)) == (2400, 1200, 1200)
    assert [slice_sizes(5100, (4, top)) for top in (6, 8)] == [(3400, 1700), (2550, 2550)]
    trace = trace_of(step([(0, 0.9), (1, 0.1)]), step([(0, 0.9), (1, 0.1)]), nbytes=4800)
    result = simulate(trace, 40000, "routed:3")
    assert result.run.mean_width == pytest.approx(3)
    assert result.run.mass_at_width == pytest.approx({2: 0.1, 4: 0.9})
    assert result.run.bytes_read_per_token == (4800 + 2400) / 2


def test_missing_layers_and_overheads():
    """A layer that the trace lacks still takes its dense part; overheads count per token, layer, miss and read."""
    overheads = {"token": 4.0, "layer": 0.25, "miss": 0.0625, "load": 0.125}
    device = dataclasses.replace(DEVICE, **{f"{name}_overhead_s": seconds for name, seconds in overheads.items()})
    trace = trace_of(step([(0, 1.0)], [(1, 1.0)]), step([(0, 1.0)], []))
    first = 4 + 2 * (1.25 + 0.0625 + 0.125 + 0.5 + 10 + 1)
    second = 4 + 2 * 1.25 + 1
    assert simulate(trace, 200, device=device).run.decode_tokens_per_s == pytest.approx(2 / (first + second))


def test_reads_slow_down_what_computes_meanwhile():
    """100 bytes take 2 s of the memory's time. One expert is read, 10.5 s, while the other computes, 15 s."""
    device = dataclasses.replace(DEVICE, memory_bytes_per_s=50.0, expert_s_per_byte={4: 0.15})
    trace = trace_of(step([(0, 0.5), (1, 0.5)], phase=PREFILL), step([(0, 0.6), (2, 0.4)]))
    seconds = 1 + 2 + 15 + 15
    assert simulate(trace, 200, device=device).run.decode_tokens_per_s == pytest.approx(1 / seconds)


def test_a_right_prediction_hides_reading_and_a_wrong_one_costs_one_chunk():
    trace = trace_of(step([(0, 1.0)], [(1, 1.0)]))
    sizes = [(100,)] * 2
    costs = Costs(DEVICE, sizes, trace.dense_bytes, (4,))

    def run(predicted):
        scheduler = Scheduler(SliceCache((300,), POLICIES["score"]([0, 1], 4, 1), dict(enumerate(sizes))), ahead=100)
        routed = {0: [RoutedExpert(0, 1, 1.0, 1)], 1: [RoutedExpert(1, 1, 1.0, 1)]}
        replay = Replay(
            costs,
            Disk(10.0, 0.5, 10.0),
            scheduler,
            lambda layer, steps: (routed[layer], [1.0]),
            lambda step, layer: [Prediction(1, predicted, 0.9, 1)] if layer == 0 and predicted is not None else [],
        )
        totals = replay.run(trace)
        assert totals.computed_s == pytest.approx(4)
        return totals.computed_s + totals.stalled_s, totals

    alone = 2 * 12.5
    assert run(None)[0] == pytest.approx(alone)
    # The read for layer 1 begins when that for layer 0 ends, at 11.5, and ends at 21.5; layer 1 computes then.
    assert run(1)[0] == pytest.approx(22.5)
    # A wrong one of 100 bytes begins at 11.5; the demand of 13.5 comes at 14 and waits for the chunk from 13.5 to 14.5.
    time, totals = run(3)
    assert time == pytest.approx(alone + 0.5)
    assert totals.prefetched == 100


def test_the_disk_reads_demands_first_and_drops_what_has_not_begun():
    disk = Disk(10.0, 1.0, 20.0)
    ahead = disk.submit(0.0, 50, ahead=True)  # chunks of 2 s from 1 s on
    other = disk.submit(0.0, 10, ahead=True)
    demand = disk.submit(1.5, 10)  # ready at 2.5, waits for the first chunk only
    assert disk.wait(demand) == pytest.approx(4)
    assert not disk.cancel(4.0, ahead)
    assert disk.cancel(4.0, other)
    assert disk.wait(ahead) == pytest.approx(7)
    assert disk.nbytes == 60
    late = disk.submit(20.0, 30, ahead=True)
    disk.promote(20.5, late)
    assert disk.wait(late) == pytest.approx(24)
    assert disk.busy_until(22.0) == pytest.approx(7)
    with pytest.raises(ValueError, match="dropped"):
        disk.wait(other)


def test_prompts_are_planned_in_chunks_by_turn():
    steps = [step([(0, 1.0)], phase=phase) for phase in (PREFILL, PREFILL, DECODE, PREFILL)]
    steps[3] = dataclasses.replace(steps[3], turn=1)
    assert [len(chunk) for chunk in chunks(trace_of(*steps))] == [2, 1, 1]
    assert max(len(chunk) for chunk in chunks(trace_of(*steps[:1] * 600))) == 512


def loads_with_least_bytes(visits, capacity):
    """The fewest loads of any sequence of evictions, by trying all of them. Every visit's experts must be resident."""
    states = {frozenset(): 0}
    for layer, experts in visits:
        wanted = {(layer, e) for e in experts}
        after = {}
        for held, loads in states.items():
            missing = len(wanted - held)
            rest = held - wanted
            spare = capacity - len(wanted)
            for kept in itertools.combinations(sorted(rest), min(spare, len(rest))):
                state = frozenset(wanted | set(kept))
                after[state] = min(after.get(state, 10**9), loads + missing)
        states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 3), min_size=1, max_size=2)), min_size=1, max_size=12),
    st.integers(2, 4),
)
def test_belady_reads_as_little_as_the_best_of_all_sequences(visits, capacity):
    def loads(policy):
        scheduler = Scheduler(SliceCache([capacity], policy))
        plans = (scheduler.plan(layer, [RoutedExpert(e, 1, 1.0, 1) for e in sorted(es)]) for layer, es in visits)
        return sum(len(wave.loads) for plan in plans for wave in plan.waves)

    best = loads(Belady([(layer, dict.fromkeys(experts, 1)) for layer, experts in visits]))
    assert best == loads_with_least_bytes(visits, capacity)
    for policy in POLICIES.values():
        assert best <= loads(policy([0, 1], 4, 1))


def test_belady_knows_when_a_refinement_is_used_next():
    visits = [(0, {0: 2}), (0, {1: 2}), (0, {0: 1, 1: 1}), (0, {2: 2}), (0, {1: 2})]
    scheduler = Scheduler(SliceCache([3, 2], Belady(visits)))
    for layer, slices in visits[:4]:
        plan = scheduler.plan(layer, [RoutedExpert(e, 1, 1.0, n) for e, n in slices.items()])
    assert plan.waves[0].evictions == ((0, 0, 1),)  # used as often as expert 1, but its refinement never again


@st.composite
def drawn(draw):
    return draw_trace(
        layers=draw(st.integers(1, 3)),
        num_experts=8,
        top_k=draw(st.integers(1, 3)),
        prompt=draw(st.integers(0, 4)),
        tokens=draw(st.integers(1, 12)),
        expert_bytes=draw(st.sampled_from([475, 1000])),
        dense_bytes=20,
        seed=draw(st.integers(0, 99)),
    )


class Watched(SliceCache):
    """Never more than fits, and what a policy is told adds up."""

    def insert(self, *args, **kwargs):
        result = super().insert(*args, **kwargs)
        held = [0] * len(self.capacity)
        for (layer, _), count in self.resident_experts().items():
            for index in range(count):
                held[index] += self.sizes(layer)[index]
        assert all(have <= room for have, room in zip(held, self.capacity, strict=True))
        return result


@settings(max_examples=60, deadline=None)
@given(drawn(), st.integers(4, 24), st.sampled_from(["fixed:4", "fixed:2", "elastic"]), st.sampled_from(list(POLICIES)))
def test_bounds_hold_and_sums_agree(trace, room, precision, policy):
    budget = room * trace.expert_bytes[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moert.scheduler.simulator.SliceCache", Watched)
        found = Simulator(trace, DEVICE).run(Settings(budget, precision, policy=policy, ahead=500))
        alone = Simulator(trace, DEVICE).run(Settings(budget, precision, policy=policy, recalls=()))
    assert found.perfect_prefetch.decode_tokens_per_s >= found.run.decode_tokens_per_s * (1 - 1e-9)
    assert found.perfect_prefetch.bytes_read_per_token == found.run.bytes_read_per_token
    assert sum(found.run.mass_at_width.values()) == pytest.approx(1)
    assert 2 <= found.run.mean_width <= 4
    assert 0 <= found.run.stall_share < 1
    if precision.startswith("fixed"):
        assert found.belady.mean_width == found.run.mean_width == int(precision[-1])
    if precision == "fixed:2":  # one class of slices of one size
        assert found.belady.bytes_read_per_token <= alone.run.bytes_read_per_token * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(drawn(), st.integers(3, 24), st.booleans())
def test_bytes_are_the_sum_of_loads(trace, room, predict):
    sizes = [slice_sizes(n, (2, 3, 4)) for n in trace.expert_bytes]
    capacity = tuple(room * n for n in sizes[0])
    policy = POLICIES["score"](range(trace.layers), trace.num_experts, 3)
    scheduler = Scheduler(Watched(capacity, policy, dict(enumerate(sizes))), ahead=500)
    disk, submitted = Disk(10.0, 0.5, 100.0), []
    costs = Costs(DEVICE, sizes, trace.dense_bytes, (2, 3, 4))
    teller = Foreteller(trace, (0.7,), 0)

    class Counting(Replay):
        def _submit(self, load, ahead=False):
            submitted.append(load)
            return super()._submit(load, ahead)

    def asks(layer, steps):
        experts = {e: w for s in steps for e, w in zip(*s.layers[layer], strict=True)}
        return [RoutedExpert(e, 1, w, 1 + (e + layer) % 3) for e, w in experts.items()], []

    def predictions(step, layer):
        return [Prediction(g.layer, e, 0.9, 2) for g in teller.guesses(step, layer) for e in g.experts]

    replay = Counting(costs, disk, scheduler, asks, predictions if predict else None)
    totals = replay.run(trace)
    disk.advance(float("inf"))  # what was still on its way
    dropped = sum(map(costs.nbytes, submitted)) - disk.nbytes
    assert totals.nbytes <= disk.nbytes
    assert dropped >= 0
    assert predict or (dropped == 0 and totals.nbytes == disk.nbytes)
    assert replay.now == pytest.approx(totals.computed_s + totals.stalled_s)


def test_the_foreteller_has_the_recall_that_is_asked_for():
    trace = draw_trace(layers=4, num_experts=16, top_k=3, prompt=0, tokens=150)
    for recall in (0.0, 0.6, 1.0):
        teller = Foreteller(trace, (recall, 1.0), 1)
        shares = [
            len(set(guess.experts) & set(s.layers[guess.layer].experts)) / 3
            for s in trace.steps
            for layer in range(4)
            for guess in teller.guesses(s, layer)[:1]
        ]
        assert len(shares) == 450
        assert sum(shares) / len(shares) == pytest.approx(recall, abs=0.04)
        assert [g.layer for g in teller.guesses(trace.steps[0], 1)] == [2, 3]
    assert all(len(set(g.experts)) == 3 for s in trace.steps for g in Foreteller(trace, (0.5,), 0).guesses(s, 0))


def test_routed_has_the_mean_that_is_asked_for():
    trace = draw_trace(tokens=40, prompt=8, top_k=4, expert_bytes=475)
    for mean in (2.2, 3.0, 3.7):
        result = simulate(trace, 20000, f"routed:{mean}")
        assert result.run.mean_width == pytest.approx(mean, abs=0.02)


def test_capacities_are_as_slots_where_all_layers_are_alike():
    sizes = slice_sizes(4750, (2, 3, 4))
    for budget in (10**5, 3 * 10**5, 10**7):
        slots = slots_for(budget, sizes, (40, 40, 40), (1.0, 0.7, 0.2))
        room = capacities(budget, [sizes] * 5, 8, (1.0, 0.7, 0.2))
        assert room == tuple(n * size for n, size in zip(slots, sizes, strict=True))
    assert sum(capacities(10**5, [sizes, slice_sizes(4000, (2, 3, 4))], 8, (1.0, 0.5, 0.5))) <= 10**5
    with pytest.raises(ValueError, match="holds not one expert; 4750 bytes would"):
        capacities(4749, [sizes] * 5, 8, (1.0, 0.7, 0.2))
    assert capacities(4750, [sizes] * 5, 8, (1.0, 0.7, 0.2)) == sizes


def test_precisions_that_are_not_known_are_refused():
    trace = draw_trace(tokens=2)
    for text in ("fixed:5", "routed:9", "best", "elastic:7"):
        with pytest.raises(ValueError, match="precision"):
            read_precision(text, trace, (2, 3, 4))


def test_too_little_room_is_refused():
    trace = draw_trace(tokens=2, expert_bytes=475)
    with pytest.raises(ValueError, match="holds not one expert; 475 bytes would"):
        simulate(trace, 474)
    with pytest.raises(ValueError, match="no whole expert"):
        simulate(trace, 300, "fixed:2")
    with pytest.raises(ValueError, match="no step of decoding"):
        Simulator(draw_trace(tokens=0), DEVICE)


def test_loads_are_counted_in_bytes():
    costs = Costs(DEVICE, [(10, 20, 30)], [0], (2, 3, 4))
    assert costs.nbytes(Load(0, 3, 1, 3)) == 50
    assert [costs.expert_s(0, n) for n in (1, 2, 3)] == pytest.approx([0.1, 0.3, 0.6])
    assert ExpertKey(0, 3) == (0, 3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 3),
    st.dictionaries(st.integers(0, 5), st.floats(0.01, 1.0)),
)
def test_score_evicts_what_has_the_lowest_running_mean(uses, skipped, foreseen):
    """Against means that are worked out anew for every expert, without scales or heaps. Layer 1 is foreseen."""
    rate, patience = 0.1, 0.5
    policy, held = RecentScore([0, 1], 6, 1, rate, patience), set()
    mean = {(layer, e): 0.0 for layer in range(2) for e in range(6)}
    for layer, used, other in uses:
        policy.used(layer, [RoutedExpert(e, 1, 0.5, 1) for e in {used, other}], 1)
        for e in range(6):
            mean[layer, e] = (1 - rate) * mean[layer, e] + rate * (e in {used, other})
        for e in {used, other} - {e for at, e in held if at == layer}:
            policy.loaded(ExpertKey(layer, e), 0)
            held.add((layer, e))
        if layer == 0:
            policy.on_prediction(1, foreseen)
        score = {
            (at, e): max(mean[at, e], foreseen.get(e, 0.0) if at > layer else 0.0)
            * (1.0 if at != layer else patience**0.5)
            for at, e in held
        }
        order = policy.eviction_order(0)
        assert (set(order), [score[key] for key in order]) == (held, pytest.approx(sorted(score.values())))
        spared = set(order[:skipped])
        victim = policy.victim(0, lambda key, spared=spared: key not in spared)
        if len(order) <= skipped:
            assert victim is None
            continue
        assert score[victim] == pytest.approx(min(score[key] for key in held - spared))
        held.discard(victim)
        policy.removed(victim, 0)
