"""The planner and the cache, checked by a model that executes plans with nothing but sets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.scheduler.cache import SliceCache
from moert.scheduler.eviction import POLICIES
from moert.scheduler.hebf import ORDERS, hottest_first
from moert.scheduler.planner import Scheduler
from moert.scheduler.precision import parse_precision
from moert.scheduler.types import ExpertKey, RoutedExpert, SliceKey

NUM_SLICES = 3


LAYERS, EXPERTS = 3, 8


@st.composite
def routes(draw):
    """An expert; where its tokens want it at different widths, how many wait for each slice."""
    slices, tokens = draw(st.integers(1, NUM_SLICES)), draw(st.integers(1, 5))
    more = sorted(draw(st.lists(st.integers(1, tokens), min_size=slices - 1, max_size=slices - 1)), reverse=True)
    waiting = (tokens, *more) if draw(st.booleans()) else ()
    return RoutedExpert(draw(st.integers(0, EXPERTS - 1)), tokens, draw(st.floats(0, 1)), slices, waiting)


@st.composite
def steps(draw):
    routed = routes()
    unique = st.lists(routed, min_size=1, max_size=8, unique_by=lambda r: r.expert)
    return draw(st.lists(st.tuples(st.integers(0, 2), unique), min_size=1, max_size=12))


def take_in(loads, memory, slots):
    for load in loads:
        assert load.first < load.last
        for index in range(load.last):
            key = SliceKey(load.layer, load.expert, index)
            assert (key in memory) == (index < load.first), "refinement only after base, and each slice read once"
            memory.add(key)
    for index, capacity in enumerate(slots):
        assert sum(key.slice == index for key in memory) <= capacity, "slots are never exceeded"


def execute(plan, routed, slots, memory):
    """Follow a plan literally; every rule of the design is asserted on the way."""
    computed = []
    for wave in plan.waves:
        for key in wave.evictions:
            memory.remove(key)
        take_in(wave.loads, memory, slots)
        assert all(load.layer == plan.layer for load in wave.loads)
        for expert in dict.fromkeys([*wave.resident, *wave.awaited, *(load.expert for load in wave.loads)]):
            for index in range(plan.slices[expert]):
                assert SliceKey(plan.layer, expert, index) in memory, "no slice is evicted while in use"
            computed.append(expert)
    assert sorted(computed) == sorted(r.expert for r in routed), "every routed expert is computed exactly once"


@settings(max_examples=200, deadline=None)
@given(
    steps(),
    st.lists(st.integers(1, 10), min_size=NUM_SLICES, max_size=NUM_SLICES),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(sorted(ORDERS)),
)
def test_plans_keep_the_rules(sequence, slots, policy, order):
    def cache_of():
        return SliceCache(slots, POLICIES[policy](range(LAYERS), EXPERTS, NUM_SLICES))

    cache, again, memory = cache_of(), cache_of(), set()
    scheduler, other = Scheduler(cache, ORDERS[order]), Scheduler(again, ORDERS[order])
    for layer, routed in sequence:
        tokens = max(r.tokens for r in routed)
        plan = scheduler.plan(layer, routed, tokens)
        assert plan == other.plan(layer, routed, tokens), "plans are deterministic"
        execute(plan, routed, slots, memory)
        expected = {SliceKey(*key, i) for key, count in cache.resident_experts().items() for i in range(count)}
        assert memory == expected, "the cache knows what is in memory"
        for index in range(NUM_SLICES):
            assert cache.free[index] == slots[index] - sum(key.slice == index for key in memory)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(1, 6))
def test_lru_hits_agree_with_stack_distance(uses, capacity):
    """An access hits an LRU cache of n exactly when fewer than n others were used since its last use."""
    scheduler = Scheduler(SliceCache([capacity]))
    for at, expert in enumerate(uses):
        before = [i for i in range(at) if uses[i] == expert]
        expected = bool(before) and len(set(uses[before[-1] + 1 : at])) < capacity
        plan = scheduler.plan(0, [RoutedExpert(expert, 1, 1.0, 1)])
        assert (not plan.waves[0].loads) == expected


def test_resident_experts_compute_before_loads_and_survive_them():
    scheduler = Scheduler(SliceCache([2]))
    scheduler.plan(0, [RoutedExpert(5, 1, 0.1, 1)])
    plan = scheduler.plan(0, [RoutedExpert(1, 9, 0.9, 1), RoutedExpert(5, 1, 0.1, 1), RoutedExpert(2, 3, 0.5, 1)])
    assert plan.waves[0].resident == (5,)
    assert [load.expert for load in plan.waves[0].loads] == [1]
    assert [load.expert for load in plan.waves[1].loads] == [2]


def test_order_is_tokens_then_weight():
    routed = [RoutedExpert(0, 1, 0.9, 1), RoutedExpert(1, 2, 0.1, 1), RoutedExpert(2, 2, 0.3, 1)]
    assert [r.expert for r in hottest_first(routed)] == [2, 1, 0]


def test_no_slot_at_all_is_an_error():
    with pytest.raises(ValueError, match="holds no expert"):
        Scheduler(SliceCache([1, 0])).plan(3, [RoutedExpert(0, 1, 1.0, 2)])


@pytest.mark.parametrize(("tokens", "slices"), [(0, 1), (1, 0)])
def test_an_expert_without_tokens_or_slices_is_refused(tokens, slices):
    with pytest.raises(ValueError, match="no tokens or no slices"):
        Scheduler(SliceCache([1])).plan(3, [RoutedExpert(0, tokens, 1.0, slices)])


def test_partial_eviction_keeps_the_base():
    cache = SliceCache([2, 1])
    cache.insert(ExpertKey(0, 0), 2, ())
    assert cache.insert(ExpertKey(0, 1), 2, (), None) == [SliceKey(0, 0, 1)]
    assert cache.resident(0, 0) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [("fixed:5", "does not hold"), ("fixed:", "not known"), ("4", "not known"), ("routed:", "not known")],
)
def test_unknown_precision_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_precision(text, (2, 3, 4))


def test_precision_counts_slices():
    assert [parse_precision(f"fixed:{b}", (2, 3, 4)).slices((2, 3, 4)) for b in (2, 3, 4)] == [1, 2, 3]
    assert str(parse_precision(None, (2, 3, 4))) == "fixed:4"


@pytest.mark.parametrize("slots", [[], [3, -1]])
def test_bad_slots_are_refused(slots):
    with pytest.raises(ValueError):
        SliceCache(slots)
