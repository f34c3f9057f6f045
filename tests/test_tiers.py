"""Plans for two tiers, carried out by an executor that checks every step of them."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from moert.devices import load_device
from moert.scheduler.assign import Pace
from moert.scheduler.cache import SliceCache
from moert.scheduler.elastic import Ladder, generic_damage
from moert.scheduler.eviction import POLICIES
from moert.scheduler.planner import Scheduler
from moert.scheduler.tiers import Tiers
from moert.scheduler.types import ExpertKey, Prediction, RoutedExpert

WIDTHS, LAYERS, EXPERTS = (2, 3, 4), 3, 6
SIZES = (2250 << 8, 1250 << 8, 1250 << 8)
PROFILE = load_device("laptop-rtx-4060-8gb")


def slots(cache, count):
    return tuple(n * size for n, size in zip(count, cache, strict=True))


def scheduler(count, policy="score", ahead=1 << 62, ladder=None):
    """With room for count[i] slices of index i."""
    cache = SliceCache(
        slots(SIZES, count), POLICIES[policy](range(LAYERS), EXPERTS, len(SIZES)), dict.fromkeys(range(LAYERS), SIZES)
    )
    return Scheduler(cache, ahead=ahead, ladder=ladder)


def tiers(host, device, *, hybrid=True, profile=PROFILE, policy="score", ahead=1 << 62, ladder=None):
    return Tiers(
        scheduler(host, policy, ahead, ladder),
        None if device is None else scheduler(device, policy, ahead),
        Pace(profile, WIDTHS, SIZES, unified=device is None),
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

    def prefix(self, key, underway=True):
        found = self.there | {k for load in self.coming if underway for k in slices_of(load)}
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
                    self.tiers.arrived(load)
            for wave in stage.device:
                self._device_wave(layer, wave, plan, computed)
            coming = dict.fromkeys([*stage.host.awaited, *(load.expert for load in stage.host.loads)])
            for e in [*stage.host.resident, *(e for e in coming if plan.host.get(e))]:
                assert self.host.prefix((layer, e), underway=False) >= plan.host[e] > 0
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
            assert device.prefix((layer, e), underway=False) >= plan.device[e] > 0
            computed.append(e)

    def prefetch(self, predictions, busy=()):
        found = self.tiers.prefetch(predictions, busy)
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


def ladder():
    damage = [generic_damage(WIDTHS)] * EXPERTS
    every = range(LAYERS)
    allowed, absent = [damage[0][1]] * EXPERTS, [1.0] * EXPERTS
    return Ladder(
        dict.fromkeys(every, damage), dict.fromkeys(every, allowed), dict.fromkeys(every, absent), SIZES, skip=0.05
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
        "ladder": ladder() if elastic else None,
    }
    executor, twin = Executor(tiers(**made)), Executor(tiers(**(made | {"ladder": ladder() if elastic else None})))
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
                    each.tiers.arrived(load)
                elif fate == "dropped":
                    del each.host.coming[load]
                    each.tiers.cancel(load)
        for load in list(executor.device.coming) if not unified else ():
            if draw(st.booleans()):
                for each in (executor, twin):
                    each.device.land(load)
                    each.tiers.moved(load)
