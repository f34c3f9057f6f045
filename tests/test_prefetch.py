"""Prefetches, evictions and trials: the scheduler between plans, checked by a model of memory and by brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES, Belady, LeastFrequentlyUsed, LeastRecentlyUsed, RecentScore
from moert.scheduler.hebf import hottest_bit_first
from moert.scheduler.lookahead import LookAhead
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import ElasticPrecision
from moert.scheduler.rank_precision import RankPrecision
from moert.scheduler.trial import HOLD, PROBE, WARM, Trial
from moert.scheduler.types import ExpertKey, Load, Prediction, RoutedExpert, SliceKey

LAYERS, EXPERTS, SLICES = 3, 6, 3
SIZES = (5, 2, 3)


def scheduler_of(slots, policy="score", ahead=40, elastic=False):
    kept = dict.fromkeys(range(LAYERS), (SLICES,) * EXPERTS)
    error_budget = ElasticPrecision(3.0).error_budget((2, 3, 4), kept, SIZES) if elastic else None
    capacity = [n * size for n, size in zip(slots, SIZES, strict=True)]
    cache = SliceCache(capacity, POLICIES[policy](range(LAYERS), EXPERTS, SLICES), dict.fromkeys(range(LAYERS), SIZES))
    return Scheduler(cache, error_budget=error_budget, ahead=ahead)


class Memory:
    """A model of what is in the arena and what is being read into it, by nothing but sets."""

    def __init__(self, slots):
        self.slots, self.held, self.in_flight = slots, set(), {}

    def evict(self, keys):
        for key in keys:
            self.held.remove(key)
            self.in_flight.pop(key, None)

    def load(self, load, ahead):
        keys = [SliceKey(load.layer, load.expert, i) for i in range(load.first, load.last)]
        assert all(SliceKey(load.layer, load.expert, i) in self.held for i in range(load.first)), (
            "base before refinement"
        )
        assert not self.held.intersection(keys), "nothing is read twice"
        self.held.update(keys)
        if ahead:
            self.in_flight.update(dict.fromkeys(keys, load))
        for index, count in enumerate(self.slots):
            assert sum(key.slice == index for key in self.held) <= count, "the budget holds"


@st.composite
def events(draw):
    layer, expert = st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)
    routed = st.lists(
        st.builds(RoutedExpert, expert, st.just(1), st.floats(0, 1), st.integers(1, SLICES), st.just(())),
        min_size=1,
        max_size=3,
        unique_by=lambda r: r.expert,
    )
    named = st.lists(
        st.builds(Prediction, st.just(0), expert, st.floats(0, 1), st.integers(0, SLICES)),
        max_size=4,
        unique_by=lambda p: p.expert,
    )
    step = st.tuples(st.just("plan"), layer, routed) | st.tuples(st.just("prefetch"), layer, named)
    end = st.tuples(st.sampled_from(["arrive", "cancel"]), st.integers(0, 9), st.none())
    return draw(st.lists(step | end, min_size=1, max_size=30))


@settings(max_examples=200, deadline=None)
@given(
    events(),
    st.lists(st.integers(1, 8), min_size=SLICES, max_size=SLICES),
    st.sampled_from(sorted(POLICIES)),
    st.booleans(),
)
def test_prefetches_between_plans_keep_the_rules(sequence, slots, policy, elastic):
    scheduler, again = (scheduler_of(slots, policy, elastic=elastic) for _ in range(2))
    memory = Memory(slots)
    busy: list[ExpertKey] = []
    for what, where, details in sequence:
        if what == "plan":
            used = {(where, r.expert) for r in details}
            squares = [r.weight**2 for r in details]
            plan = scheduler.plan(where, details, 1, squares)
            assert plan == again.plan(where, details, 1, squares), "plans are deterministic"
            computed = []
            for wave in plan.waves:
                memory.evict(wave.evictions)
                for load in wave.loads:
                    memory.load(load, ahead=False)
                here = dict.fromkeys([*wave.resident, *wave.awaited, *(load.expert for load in wave.loads)])
                for e in here:
                    keys = {SliceKey(where, e, i) for i in range(plan.slices[e])}
                    assert keys <= memory.held, "what computes is in memory"
                    late = any(key in memory.in_flight for key in keys)
                    assert not late or e in wave.awaited, "what is still being read is waited for"
                computed += here
            assert sorted(computed) == sorted(r.expert for r in details), "each expert is computed exactly once"
            busy = [ExpertKey(where, r.expert) for r in details] if len(details) > 1 else []
            for load in {load for load in memory.in_flight.values() if (load.layer, load.expert) in used}:
                memory.in_flight = {key: other for key, other in memory.in_flight.items() if other != load}
                for s in (scheduler, again):
                    s.arrived(load)  # it was waited for
        elif what == "prefetch":
            named = [p._replace(layer=where) for p in details]
            before = set(memory.held)
            for s in (scheduler, again):
                s.cache.in_use = set(busy)
            found = scheduler.prefetch(named)
            assert found == again.prefetch(named)
            memory.evict(found.evictions)
            for load in found.loads:
                memory.load(load, ahead=True)
            kept = {key for key in before if key[:2] in busy}
            assert kept <= memory.held, "nothing that is in use is evicted"
            size = sum(sum(SIZES[load.first : load.last]) for load in set(memory.in_flight.values()))
            assert size <= 40 or not found.loads, "no more is underway than allowed"
        elif memory.in_flight:
            loads = sorted(set(memory.in_flight.values()))
            load = loads[where % len(loads)]
            keys = [key for key, other in memory.in_flight.items() if other == load]
            if what == "cancel" and len(keys) < load.last - load.first:
                continue  # some of it was evicted: then the runtime waits for the rest
            for key in keys:
                del memory.in_flight[key]
                if what == "cancel":
                    memory.held.remove(key)
            for s in (scheduler, again):
                (s.arrived if what == "arrive" else s.cancel)(load)
        resident = scheduler.cache.resident_experts()
        assert memory.held == {SliceKey(*key, i) for key, n in resident.items() for i in range(n)}


def test_a_prefetch_evicts_only_what_is_less_likely_to_be_used():
    scheduler = scheduler_of((1, 1, 1))
    for _ in range(20):
        scheduler.plan(0, [RoutedExpert(0, 1, 1.0, 3)])
    assert scheduler.prefetch([Prediction(1, 4, 0.5, 3)]).loads == ()
    assert scheduler.prefetch([Prediction(1, 4, 0.99, 3)]).loads == (Load(1, 4, 0, 3),)


def test_what_is_foreseen_is_protected():
    scheduler = scheduler_of((2, 2, 2))
    for expert in (0, 1, 1):
        scheduler.plan(0, [RoutedExpert(expert, 1, 1.0, 3)])
    scheduler.prefetch([Prediction(0, 0, 0.9, 0)])
    plan = scheduler.plan(1, [RoutedExpert(5, 1, 1.0, 3)])
    assert {key.expert for key in plan.waves[0].evictions} == {1}


def run(policy, visits, slots):
    """Hits of one-slice experts."""
    scheduler, hits = Scheduler(SliceCache([slots], policy)), 0
    for layer, experts in visits:
        plan = scheduler.plan(layer, [RoutedExpert(e, 1, 1.0, 1) for e in experts])
        hits += len(plan.waves[0].resident)
    return hits


def belady(visits):
    return Belady([(layer, dict.fromkeys(experts, 1)) for layer, experts in visits])


def best_hits(visits, slots):
    """Most hits of any choice of evictions, by trying all (sets of resident experts after each visit)."""
    states = {frozenset(): 0}
    for layer, experts in visits:
        keys, after = {(layer, e) for e in experts}, {}
        for state, hits in states.items():
            others = state - keys
            for mask in range(1 << len(others)):
                kept = {key for i, key in enumerate(sorted(others)) if mask >> i & 1}
                if len(kept) + len(keys) <= slots:
                    now = frozenset(kept | keys)
                    after[now] = max(after.get(now, 0), hits + len(state & keys))
        states = after
    return max(states.values())


VISITS = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(VISITS, st.integers(2, 4))
def test_belady_is_the_best_there_is(visits, slots):
    best = run(belady(visits), visits, slots)
    assert best == best_hits(visits, slots)
    for name in POLICIES:
        assert run(POLICIES[name](range(2), 4, 1), visits, slots) <= best


def test_a_cycle_larger_than_the_cache_leaves_lru_nothing_and_the_score_something():
    """The cliff: recency evicts exactly what comes next."""
    visits = [(layer, [0, 1]) for _ in range(30) for layer in range(6)]
    assert run(LeastRecentlyUsed(), visits, 8) == 0
    assert run(RecentScore(range(6), 4, 1), visits, 8) > 0.5 * run(belady(visits), visits, 8)


def test_scores_beat_recency_on_popular_experts():
    g = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 33) ** 1.1
    popularity /= popularity.sum()
    visits = [(layer, g.choice(32, 4, False, popularity).tolist()) for _ in range(150) for layer in range(4)]
    lru, score = run(LeastRecentlyUsed(), visits, 32), run(RecentScore(range(4), 32, 1), visits, 32)
    assert lru < score < run(belady(visits), visits, 32)
    assert lru < run(LeastFrequentlyUsed(), visits, 32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=40))
def test_a_score_is_the_running_mean_of_uses(steps):
    policy, expected = RecentScore([7], 6, 2, rate=0.1), np.zeros((2, 6))
    for experts in steps:
        policy.used(7, [RoutedExpert(e, 1, 1.0, 1 + e % 2) for e in experts], 1)
        expected *= 0.9
        for e in experts:
            expected[: 1 + e % 2, e] += 0.1
    found = [[policy.reuse_score(ExpertKey(7, e), i) for e in range(6)] for i in range(2)]
    assert np.allclose(found, expected)


def test_a_prompt_counts_as_its_tokens():
    one, many = RecentScore([0], 4, 1), RecentScore([0], 4, 1)
    for _ in range(50):
        one.used(0, [RoutedExpert(2, 1, 1.0, 1)], 1)
    many.used(0, [RoutedExpert(2, 50, 50.0, 1)], 50)
    assert one.reuse_score(ExpertKey(0, 2), 0) == pytest.approx(many.reuse_score(ExpertKey(0, 2), 0))


@st.composite
def chains(draw):
    missing = []
    for expert in range(draw(st.integers(1, 3))):
        slices = draw(st.integers(1, 3))
        waiting = sorted(draw(st.lists(st.integers(1, 9), min_size=slices, max_size=slices)), reverse=True)
        missing.append(
            (RoutedExpert(expert, waiting[0], 1.0, slices, tuple(waiting)), draw(st.integers(0, slices - 1)))
        )
    return missing


def waited(loads, missing, sizes):
    """Sum over tokens and slices of the bytes read until a slice is there."""
    time, total, routed = 0, 0, {r.expert: r for r, _ in missing}
    for load in loads:
        for index in range(load.first, load.last):
            time += sizes[index]
            total += routed[load.expert].waiting[index] * time
    return total


def interleavings(chains):
    if not any(chains):
        yield []
    for i, chain in enumerate(chains):
        if chain:
            for rest in interleavings([*chains[:i], chain[1:], *chains[i + 1 :]]):
                yield [chain[0], *rest]


@settings(max_examples=60, deadline=None)
@given(chains())
def test_no_order_of_slices_makes_tokens_wait_less(missing):
    loads = hottest_bit_first(0, missing, SIZES)
    singles = [[Load(0, r.expert, i, i + 1) for i in range(first, r.slices)] for r, first in missing]
    assert waited(loads, missing, SIZES) == min(waited(order, missing, SIZES) for order in interleavings(singles))


def feed(trial, seconds, steps):
    """Run a trial on a machine where a choice takes seconds(choice, step); returns the choices made."""
    choices = []
    for step in range(steps):
        choices.append(trial.choice)
        trial.step(seconds(trial.choice, step))
    return choices


@pytest.mark.parametrize(
    ("costs", "best"), [((1.0, 0.8), 1), ((1.0, 1.05), 0), ((1.0, 0.97), 1), ((1.0, 0.99), 0), ((1.0, 1.0), 0)]
)
def test_a_trial_keeps_what_is_faster(costs, best):
    choices = feed(Trial((0, 1)), lambda choice, step: costs[choice], WARM + 4 * PROBE + HOLD)
    assert set(choices[:WARM]) == {0}
    choices = choices[WARM:]
    turns = [0, 1, 1, 0] if costs[1] < costs[0] else [0, 1]  # what is slower is not tried again
    assert choices[: len(turns) * PROBE] == [choice for choice in turns for _ in range(PROBE)]
    assert set(choices[len(turns) * PROBE : len(turns) * PROBE + HOLD]) == {best}


def test_a_trial_wants_a_choice_to_be_faster_both_times():
    """0.5 in its first turn, a little slower than the first choice in its second: in sum it would be far ahead."""
    seconds = [1.0] * (WARM + PROBE) + [0.5] * PROBE + [1.05] * PROBE + [1.0] * (PROBE + 1)
    assert feed(Trial((0, 1)), lambda choice, step: seconds[step], len(seconds))[-1] == 0


def test_a_trial_is_not_deceived_by_a_machine_that_slows_down():
    choices = feed(Trial((0, 1)), lambda choice, step: (1.0, 0.9)[choice] * (1 + step / 200), WARM + 5 * PROBE)
    assert choices[-1] == 1


def test_a_trial_is_held_again_when_times_have_changed():
    round_ = 4 * PROBE + HOLD
    change = WARM + round_
    choices = feed(Trial((0, 1)), lambda choice, step: (1.0, 0.8 if step < change else 1.2)[choice], change + HOLD)
    assert choices[change - 1] == 1
    assert choices[-1] == 0


def test_a_single_choice_needs_no_trial():
    assert set(feed(Trial((2,)), lambda choice, step: 1.0, 100)) == {2}


def test_odds_are_the_shares_of_right_guesses():
    odds, g = RankPrecision(), np.random.default_rng(1)
    for _ in range(3000):
        used = {e for e, p in ((0, 0.9), (1, 0.4), (2, 0.05)) if g.random() < p}
        odds.watch(0, 5, [(0, 0), (1, 1), (2, 2)])
        odds.learn(5, used)
    assert [odds.of(0, rank) for rank in range(3)] == pytest.approx([0.9, 0.4, 0.05], abs=0.1)
    assert odds.of(1, 0) == 0.5, "nothing is known of what was never watched"


def test_a_refinement_is_not_read_whose_base_the_same_prefetch_evicts():
    scheduler = scheduler_of((1, 1, 1), elastic=True)
    plan = scheduler.plan(0, [RoutedExpert(0, 1, 1.0, 3)], 1, [1.0])
    assert plan.slices == {0: 2}, "the bound of 3 bits leaves a slice to refine"
    found = scheduler.prefetch([Prediction(1, 4, 0.99, 1)])
    assert found.loads == (Load(1, 4, 0, 1),)
    assert scheduler.cache.resident_experts() == {ExpertKey(1, 4): 1}


def test_looking_ahead_counts_how_many_of_the_experts_used_it_had_named():
    ahead = LookAhead((1,))
    assert ahead.line() == ""
    ahead.on_router_prediction(0, [SimpleNamespace(layer=1, experts=[5, 6, 7, 8], weights=[0.4, 0.3, 0.2, 0.1])])
    found = ahead.predictions(lambda layer, experts, weights: [3] * 4, lambda layer, experts, slices: [1, 3])
    assert found == [Prediction(1, 5, 1.0, 0), Prediction(1, 6, 0.5, 3), Prediction(1, 8, 0.5, 3)]
    ahead.learn(1, [6, 7])
    assert ahead.stats.recall == 0.5, "of the two best of four named, as many as a router chooses, one was right"
    assert "50.0% of the next layer's experts" in ahead.line()
