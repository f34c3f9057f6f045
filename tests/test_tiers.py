"""Plans for two tiers, carried out by an executor that checks every step of them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.hardware.devices import load_device
from moert.scheduler.assign import CostModel
from moert.scheduler.cache import SliceCache
from moert.scheduler.elastic import ErrorBudget, generic_sensitivity
from moert.scheduler.eviction import POLICIES
from moert.scheduler.planner import Scheduler
from moert.scheduler.tiers import Tiers
from moert.scheduler.types import ExpertKey, Prediction, RoutedExpert

WIDTHS, LAYERS, EXPERTS = (2, 3, 4), 3, 6
SIZES = (2250 << 8, 1250 << 8, 1250 << 8)
PROFILE = load_device("laptop-rtx-4060-8gb")


def slots(cache, count):
    return tuple(n * size for n, size in zip(count, cache, strict=True))


def scheduler(count, policy="score", ahead=1 << 62, error_budget=None):
    """With room for count[i] slices of index i."""
    cache = SliceCache(
        slots(SIZES, count), POLICIES[policy](range(LAYERS), EXPERTS, len(SIZES)), dict.fromkeys(range(LAYERS), SIZES)
    )
    return Scheduler(cache, ahead=ahead, error_budget=error_budget)


def tiers(host, device, *, hybrid=True, profile=PROFILE, policy="score", ahead=1 << 62, error_budget=None):
    return Tiers(
        scheduler(host, policy, ahead, error_budget),
        None if device is None else scheduler(device, policy, ahead),
        CostModel(profile, WIDTHS, SIZES, unified=device is None),
        hybrid,
    )


class Memory:
    """Slices that are really there, and those on their way that nobody waits for."""

    def __init__(self, cache):
        self.cache, self.there, self.coming = cache, set(), {}

    def evict(self, keys):
        for key in keys:
            at = next((load for load in self.coming if key in slices_of(load)), None)
            if at is None:
                self.there.remove(key)
            else:  # what is on its way is waited for, or dropped; then it is evicted
                self.there |= set(slices_of(at))
                del self.coming[at]
                self.there.remove(key)

    def begin(self, load):
        found = slices_of(load)
        assert not any(key in self.there for key in found), "what is there is not loaded again"
        assert load.first == 0 or load.first <= self.prefix(load[:2]), "a slice without those before it"
        self.coming[load] = None
        self.fits()

    def land(self, load):
        del self.coming[load]
        self.there |= set(slices_of(load))

    def prefix(self, key, in_flight=True):
        found = self.there | {k for load in self.coming if in_flight for k in slices_of(load)}
        return next(n for n in range(99) if (*key, n) not in found)

    def fits(self):
        for index, room in enumerate(self.cache.capacity):
            every = [k for k in self.there if k[2] == index] + [
                k for load in self.coming for k in slices_of(load) if k[2] == index
            ]
            assert len(every) * SIZES[index] <= room


def slices_of(load):
    return [(load.layer, load.expert, index) for index in range(load.first, load.last)]


class Executor:
    """Does what plans say, and knows by itself what is where."""

    def __init__(self, tiers):
        self.tiers = tiers
        self.host = Memory(tiers.host.cache)
        self.device = self.host if tiers.device is None else Memory(tiers.device.cache)
        self.moves = self.reads = 0

    def run(self, layer, routed, tokens=1, squares=()):
        plan = self.tiers.plan(layer, routed, tokens, squares)
        assert plan.host.keys() | plan.device.keys() == {r.expert for r in routed}
        assert not plan.host.keys() & plan.device.keys()
        computed = []
        for stage in plan.stages:
            self.host.evict(stage.host.evictions)
            for load in stage.host.loads:
                self.host.begin(load)
            self.reads += len(stage.host.loads)
            for load in [*stage.host.loads, *(load for load in self.host.coming if load.layer == layer)]:
                if load in self.host.coming and (load in stage.host.loads or load.expert in stage.host.awaited):
                    self.host.land(load)
                    self.tiers.host.arrived(load)
            for wave in stage.device:
                self._device_wave(layer, wave, plan, computed)
            coming = dict.fromkeys([*stage.host.awaited, *(load.expert for load in stage.host.loads)])
            for e in [*stage.host.resident, *(e for e in coming if plan.host.get(e))]:
                assert self.host.prefix((layer, e), in_flight=False) >= plan.host[e] > 0
                computed.append(e)
        assert sorted(computed) == sorted(e for e, n in plan.slices.items() if n)
        self.agrees()
        return plan

    def _device_wave(self, layer, wave, plan, computed):
        device = self.device
        if self.tiers.device is None:
            assert not wave.loads
            assert not wave.evictions
        device.evict(wave.evictions)
        for load in wave.loads:
            assert set(slices_of(load)) <= self.host.there, "a move of what is not in host memory"
            device.begin(load)
            device.land(load)
            self.moves += 1
        if device is not self.host:
            for load in [load for load in device.coming if load.layer == layer and load.expert in wave.awaited]:
                device.land(load)
                self.tiers.moved(load)
        for e in dict.fromkeys([*wave.resident, *wave.awaited, *(load.expert for load in wave.loads)]):
            assert device.prefix((layer, e), in_flight=False) >= plan.device[e] > 0
            computed.append(e)

    def prefetch(self, predictions, busy=()):
        self.tiers.pin(busy[0].layer if busy else -1, [key.expert for key in busy])
        found = self.tiers.prefetch(predictions)
        for key in [*found.host.evictions, *found.device.evictions]:
            assert ExpertKey(*key[:2]) not in busy
        self.host.evict(found.host.evictions)
        for load in found.host.loads:
            self.host.begin(load)
        if self.tiers.device is None:
            assert not found.device.loads
        else:
            self.device.evict(found.device.evictions)
        for load in found.device.loads:
            assert set(slices_of(load)) <= self.host.there
            self.device.begin(load)
        self.agrees()
        return found

    def agrees(self):
        for memory in (self.host, self.device):
            for key, n in memory.cache.resident_experts().items():
                assert memory.prefix(key) == n
            assert {k[:2] for k in memory.there} <= memory.cache.resident_experts().keys()
            memory.fits()


def error_budget():
    sensitivity = [generic_sensitivity(WIDTHS)] * EXPERTS
    every = range(LAYERS)
    allowed, absent = [sensitivity[0][1]] * EXPERTS, [1.0] * EXPERTS
    return ErrorBudget(
        dict.fromkeys(every, sensitivity), dict.fromkeys(every, allowed), dict.fromkeys(every, absent), SIZES, skip=0.05
    )


routings = st.dictionaries(st.integers(0, EXPERTS - 1), st.tuples(st.integers(1, 3), st.floats(0.01, 1)), min_size=1)
rooms = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
speeds = st.sampled_from([1e-12, 2e-11, 1e-10])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_routed_all_of_it_is_computed_once_from_what_is_there(data):
    draw = data.draw
    unified, hybrid = draw(st.booleans()), draw(st.booleans())
    elastic = draw(st.booleans())
    profile = dataclasses.replace(
        PROFILE,
        gpu_expert_s_per_byte={4: draw(speeds)},
        host_to_device_bytes_per_s=draw(st.sampled_from([1e9, 1e10, 1e12])),
        disk_bytes_per_s=draw(st.sampled_from([1e8, 1e12])),
    )
    made = {
        "host": draw(rooms),
        "device": None if unified else draw(rooms),
        "hybrid": hybrid,
        "profile": profile,
        "policy": draw(st.sampled_from(list(POLICIES))),
        "ahead": draw(st.sampled_from([0, 8000 << 8, 1 << 40])),
        "error_budget": error_budget() if elastic else None,
    }
    executor, twin = (
        Executor(tiers(**made)),
        Executor(tiers(**(made | {"error_budget": error_budget() if elastic else None}))),
    )
    for at in range(draw(st.integers(1, 12))):
        layer = at % LAYERS
        asked = draw(routings)
        tokens = draw(st.sampled_from([1, 1, 40]))
        routed = [RoutedExpert(e, tokens, w, n) for e, (n, w) in asked.items()]
        squares = [r.weight**2 for r in routed] if elastic else []
        plan = executor.run(layer, routed, tokens, squares)
        assert plan == twin.run(layer, routed, tokens, squares), "not the same for the same calls"
        if not elastic:
            assert plan.slices == {r.expert: r.slices for r in routed}
        if not hybrid:
            assert not any(plan.host.values())
        named = draw(st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.integers(0, 3)), unique_by=lambda p: p[0]))
        guesses = [Prediction((layer + 1) % LAYERS, e, draw(st.floats(0, 1)), n) for e, n in named]
        busy = [ExpertKey(layer, e) for e in asked]
        prefetch = executor.prefetch(guesses, busy)
        assert prefetch == twin.prefetch(guesses, busy)
        for each in (executor, twin):
            assert sum(sum(SIZES[a.first : a.last]) for a in each.device.coming) <= made["ahead"]
        for load in list(executor.host.coming):
            fate = draw(st.sampled_from(["waits", "arrives", "dropped"]))
            for each in (executor, twin):
                if fate == "arrives":
                    each.host.land(load)
                    each.tiers.host.arrived(load)
                elif fate == "dropped":
                    del each.host.coming[load]
                    each.tiers.host.cancel(load)
        for load in list(executor.device.coming) if not unified else ():
            if draw(st.booleans()):
                for each in (executor, twin):
                    each.device.land(load)
                    each.tiers.moved(load)


def routed(*experts, tokens=1, slices=3):
    return [RoutedExpert(e, tokens, 1.0, slices) for e in experts]


def hold(scheduler, layer, experts, slices=3):
    for e in experts:
        scheduler.cache.insert(ExpertKey(layer, e), slices, ())


def test_what_the_device_has_is_computed_there_and_the_host_is_not_told():
    both = tiers((6, 6, 6), (3, 3, 3))
    hold(both.host, 0, range(4))
    hold(both.device, 0, [0, 1])
    plan = both.plan(0, routed(0, 1))
    assert (plan.device, plan.host) == ({0: 3, 1: 3}, {})
    assert plan.stages[0].device[0].resident == (0, 1)
    reuse_score = [
        [tier.cache.policy.reuse_score(ExpertKey(0, e), 0) for e in range(2)] for tier in (both.host, both.device)
    ]
    assert reuse_score == [[0, 0], [pytest.approx(0.1)] * 2]
    plan = both.plan(0, routed(2))
    assert plan.host == {2: 3}  # a move takes longer than computing it
    assert plan.predicted["host"] > 0 == plan.predicted["move"]
    assert (
        both.host.cache.policy.reuse_score(ExpertKey(0, 2), 0)
        == both.device.cache.policy.reuse_score(ExpertKey(0, 2), 0)
        > 0
    )


def test_what_leaves_the_device_is_worth_to_the_host_what_it_was_there():
    both = tiers((6, 6, 6), (1, 1, 1), hybrid=False)
    hold(both.host, 0, range(2))
    for _ in range(5):
        both.plan(0, routed(0))
    known = both.device.cache.policy.reuse_score(ExpertKey(0, 0), 2)
    plan = both.plan(0, routed(1))
    assert [key.expert for key in plan.stages[0].device[0].evictions] == [0, 0, 0]
    assert both.host.cache.policy.reuse_score(ExpertKey(0, 0), 2) == pytest.approx(known * 0.9)


def test_a_device_too_small_for_a_layer_computes_it_in_waves():
    both = tiers((6, 6, 6), (2, 2, 2), hybrid=False)
    plan = both.plan(0, routed(0, 1, 2, 3, 4))
    waves = [wave for stage in plan.stages for wave in stage.device]
    assert [len(wave.loads) for wave in waves] == [2, 2, 1]
    small = tiers((6, 6, 6), (2, 2, 0))
    with pytest.raises(ValueError, match="the arena holds no expert of 3 slices"):
        dataclasses.replace(small, hybrid=False).plan(0, routed(0))
    plan = small.plan(0, [*routed(0, tokens=500), *routed(1, slices=2, tokens=500)])
    assert plan.host == {0: 3}  # the device never holds three slices
    assert plan.device == {1: 2}


def test_moves_ahead_go_by_gain_within_their_bound():
    """In a layer that is in host memory as a whole, the likelier is moved first, and one at a time is the bound."""
    slow = dataclasses.replace(PROFILE, expert_s_per_byte={4: 1e-9})
    both = tiers((6, 6, 6), (6, 6, 6), profile=slow, ahead=sum(SIZES))
    hold(both.host, 1, range(3))
    guesses = [Prediction(1, e, p, 3) for e, p in ((0, 0.4), (1, 0.9), (2, 0.6), (3, 0.99))]
    found = both.prefetch(guesses)
    assert found.device.loads == ((1, 1, 0, 3),)
    assert found.host.loads == ((1, 3, 0, 3),)
    both.moved(found.device.loads[0])
    again = both.prefetch(guesses)
    assert again.device.loads == ((1, 2, 0, 3),)
    fast = dataclasses.replace(PROFILE, expert_s_per_byte={4: 1e-14})  # the host computes in no time
    none = tiers((6, 6, 6), (6, 6, 6), profile=fast)
    hold(none.host, 1, range(3))
    assert none.prefetch(guesses).device.loads == ()


def test_a_move_ahead_does_not_evict_what_would_have_to_be_read_again():
    slow = dataclasses.replace(PROFILE, expert_s_per_byte={4: 1e-9})
    guess = [Prediction(1, 5, 0.5, 3)]
    for at_host, evicted in (([], 0), ([0], 3)):
        both = tiers((6, 6, 6), (1, 1, 1), profile=dataclasses.replace(slow, disk_bytes_per_s=1e7))
        hold(both.device, 0, [0])
        hold(both.host, 0, at_host)
        hold(both.host, 1, [5])
        both.plan(0, routed(0))
        found = both.prefetch(guess)
        assert len(found.device.evictions) == evicted
        assert len(found.device.loads) == (1 if evicted else 0)


def test_what_the_host_computed_fills_room_that_is_free():
    both = tiers((6, 6, 6), (1, 1, 1))
    hold(both.host, 0, range(2))
    assert both.plan(0, routed(0, 1)).host == {0: 3, 1: 3}
    found = both.prefetch([])
    assert found.device.loads == ((0, 0, 0, 3),)
    assert found.device.evictions == ()
    assert both.plan(0, routed(1)).host == {1: 3}
    assert both.prefetch([]).device.loads == ()
