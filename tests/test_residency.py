"""Where slices are, through steps that break off anywhere: interrupts after any line, reads that fail or come late."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import StoreError
from moert.quant.format import ExpertLayout
from moert.runtime import residency as residency_module
from moert.runtime.arena import Arena
from moert.runtime.executor import Policies
from moert.runtime.residency import Residency
from moert.runtime.telemetry import Telemetry
from moert.runtime.waves import WaveRunner
from moert.scheduler.eviction import POLICIES
from moert.scheduler.planner import Scheduler
from moert.scheduler.types import ExpertKey, Prediction, RoutedExpert, SliceKey

from .interrupts import interrupt_after

LAYERS, EXPERTS, SLICES = 2, 5, 3
LAYOUT = ExpertLayout(64, 32, 32, (2, 3, 4))
SIZES = LAYOUT.slice_sizes


class Late:
    """The end of a read: it has come when the test says so, or when somebody waits for it."""

    def __init__(self, reader, read):
        self.reader, self.read, self.over = reader, read, False

    def is_set(self):
        return self.over

    def wait(self):
        assert self.read in self.reader.queue or self.over, "a read that nobody reads is waited for"
        self.reader.finish(self.read)

    def set(self):
        self.over = True


class LateReader:
    """Writes into its memory of which slice each byte is, when it is told to."""

    def __init__(self, memory):
        self.memory, self.queue, self.failing = memory, [], 0

    def submit(self, read, ahead=False):
        read._done = Late(self, read)
        self.queue.append(read)

    def promote(self, read):
        assert read in self.queue or read.done

    def begin(self, read):
        read._started, read.begun = True, 1.0

    def finish(self, read):
        if read._done.over:
            return
        self.begin(read)
        if self.failing:
            self.failing -= 1
            read.error = StoreError("Input/output error")
        for at, size, mark in read.parts:
            self.memory[at : at + size] = 255 if read.error else mark
        self.queue.remove(read)
        read._done.over = True

    def cancel(self, read):
        if read._started:
            return False
        if read in self.queue:
            self.queue.remove(read)
        read.end()
        return True

    def drain(self):
        for read in list(self.queue):
            if read._started:
                self.finish(read)
            else:
                self.queue.remove(read)
                read.end()

    def close(self): ...


class Table:
    """The slices of experts that are said to be there."""

    def __init__(self, layout, activation, memory):
        self.there = {}

    def put(self, layer, expert, offsets):
        self.there[layer, expert] = list(offsets)

    def drop_from(self, layer, expert, count):
        kept = self.there.get((layer, expert), [])[:count]
        self.there.pop((layer, expert), None)
        if kept:
            self.there[layer, expert] = kept


def mark(layer, expert, index):
    return 1 + (layer * EXPERTS + expert) * SLICES + index


class World:
    """An owner with a reader that is late, and all that must always be true of it."""

    def __init__(self, slots, policy):
        store = SimpleNamespace(
            layout=LAYOUT,
            kept=dict.fromkeys(range(LAYERS), (SLICES,) * EXPERTS),
            location=lambda layer, expert: SimpleNamespace(file=None, offset=0),
            checksum=mark,
        )
        telemetry = Telemetry(LAYOUT.widths, store.kept)
        cache = Policies(cache=policy).new_cache(store, slots)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residency_module, "make_reader", LateReader)
            patch.setattr(residency_module, "ExpertTable", Table)
            self.residency = Residency(store, slots, cache, "silu", telemetry)
        self.residency._checked = Unchecked()
        self.scheduler = Scheduler(cache, ahead=sum(SIZES) * 3)
        self.waves = WaveRunner(self.residency, SLICES, telemetry)
        self.slots = slots

    @property
    def reader(self):
        return self.residency.reader

    def token(self, layer, routed):
        """One layer of one token, as the executor goes through it; returns what was computed."""
        computed = []
        wanted = {r.expert: r.slices for r in routed}

        def compute(ready):
            for e, n in ready.items():
                if e not in computed and n >= wanted[e]:
                    offsets = self.residency.table.there[layer, e]
                    assert len(offsets) >= wanted[e], "what computes is there"
                    computed.append(e)
            self.safe()

        self.scheduler.used(layer, routed)
        self.residency.update()
        for wave in self.scheduler.waves(layer, routed, [r.slices for r in routed]):
            self.waves.run(wave, layer, compute)
        assert sorted(computed) == sorted(wanted), "each expert is computed exactly once"

    def prefetch(self, layer, named):
        self.residency.update()
        self.residency.drop_unwanted(layer, [p.expert for p in named[:1]])
        self.scheduler.pin(layer, ())
        self.scheduler.prefetch([p._replace(layer=(layer + 1) % LAYERS) for p in named])
        self.residency.carry_out()

    def safe(self):
        """True at any time, also in the middle of what broke off: what can be computed has the right bytes."""
        for (layer, expert), offsets in self.residency.table.there.items():
            for index, at in enumerate(offsets):
                found = set(self.residency.arena.memory[at : at + SIZES[index]].tolist())
                assert found == {mark(layer, expert, index)}, "a slot of another slice, or not read yet"

    def settled(self):
        """True between steps."""
        residency, cache = self.residency, self.scheduler.cache
        residency.update()
        self.safe()
        assert not cache.orders.leaving
        assert not cache.orders.coming
        resident = cache.resident_experts()
        held = {SliceKey(*key, i) for key, n in resident.items() for i in range(n)}
        assert residency.arena.held() == held, "slots follow the state"
        for index, count in enumerate(self.slots):
            used = sum(key.slice == index for key in held)
            assert used <= count
            assert cache.free[index] + used * SIZES[index] == count * SIZES[index], "nothing is lost"
            order = list(cache.policy.eviction_order(index))
            assert sorted(key for key in order if resident[key] > index) == sorted(
                key for key, n in resident.items() if n > index
            )
        flying = [load for loads in cache.in_flight.values() for load in loads]
        assert Counter(flying) == Counter(residency._reads.keys())
        assert cache.ahead.keys() <= set(flying)
        for layer in range(LAYERS):
            for e in range(EXPERTS):
                there = cache.there(layer, e)
                assert len(residency.table.there.get((layer, e), ())) == there, "the table follows the state"
                assert bool(residency.present[layer][e]) == (there > 0)
        self.all_can_be_evicted(resident)

    def all_can_be_evicted(self, resident):
        """A policy that an interrupt had made forget an expert would never let it go."""
        for index in range(SLICES):
            left = {key for key, n in resident.items() if n > index}
            while left:
                victim = self.scheduler.cache.policy.victim(index, left.__contains__)
                assert victim in left
                left.remove(victim)


class Unchecked(set):
    """What was read before is checked again, so that each read says what it is of."""

    def __contains__(self, key):
        return False


@st.composite
def steps(draw):
    layer, expert = st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)
    routed = st.lists(
        st.builds(RoutedExpert, expert, st.just(1), st.floats(0, 1), st.integers(1, SLICES), st.just(())),
        min_size=1,
        max_size=3,
        unique_by=lambda r: r.expert,
    )
    named = st.lists(
        st.builds(Prediction, st.just(0), expert, st.floats(0.5, 1), st.integers(1, SLICES)),
        min_size=1,
        max_size=3,
        unique_by=lambda p: p.expert,
    )
    one = st.tuples(st.just("token"), layer, routed) | st.tuples(st.just("prefetch"), layer, named)
    disk = st.tuples(st.sampled_from(["begin", "finish", "fail"]), st.integers(0, 3), st.none())
    # After how many lines something breaks off; a step has some 300.
    return draw(st.lists(st.tuples(one | disk, st.one_of(st.just(0), st.integers(1, 400))), min_size=1, max_size=14))


@settings(max_examples=150, deadline=None)
@given(steps(), st.lists(st.integers(1, 6), min_size=SLICES, max_size=SLICES), st.sampled_from(sorted(POLICIES)))
def test_whatever_breaks_off_where_slices_are_stays_right(sequence, slots, policy):
    world = World(slots, policy)
    for (what, where, details), lines in sequence:
        queue = world.reader.queue
        if what in ("begin", "finish"):
            if queue:
                getattr(world.reader, what)(queue[where % len(queue)])
        elif what == "fail":
            world.reader.failing = 1
        else:
            try:
                with interrupt_after(lines):
                    getattr(world, what)(where, details)
            except (KeyboardInterrupt, StoreError):
                world.safe()
        if what != "fail":
            world.reader.failing = 0
        world.settled()
    world.reader.failing = 0
    for layer in range(LAYERS):  # and it goes on
        world.token(layer, [RoutedExpert(0, 1, 1.0, SLICES)])
        world.settled()


def test_a_change_that_was_not_committed_has_not_happened():
    world = World((2, 2, 2), "lru")
    cache = world.scheduler.cache
    world.token(0, [RoutedExpert(1, 1, 1.0, 3), RoutedExpert(2, 1, 0.5, 3)])
    before = cache.resident_experts(), list(cache.free), list(cache.policy.eviction_order(0))
    cache.in_use = ()
    change = cache.draft()
    assert change.insert(ExpertKey(1, 4), 2)
    assert change.evicted
    assert before == (cache.resident_experts(), cache.free, list(cache.policy.eviction_order(0)))
    cache.commit(change)
    assert cache.resident(1, 4) == 2
    assert cache.resident_experts() != before[0]


def test_a_read_that_nobody_waits_for_any_more_arrives_later():
    world = World((4, 4, 4), "score")
    wait, calls = world.residency.wait, iter((True, False, False, False))

    def interrupted(load):
        if next(calls):
            raise KeyboardInterrupt
        wait(load)

    world.residency.wait = interrupted
    routed = [RoutedExpert(3, 1, 1.0, 3)]
    with pytest.raises(KeyboardInterrupt):
        world.token(0, routed)
    [read] = world.reader.queue
    world.reader.finish(read)
    world.settled()
    assert world.scheduler.cache.there(0, 3) == 3
    world.token(0, routed)
    assert not world.reader.queue, "it is not read again"


def test_a_read_of_which_nobody_knows_whether_it_was_begun_is_over_before_its_slot_is_used():
    world = World((4, 4, 4), "score")
    world.prefetch(0, [Prediction(0, 3, 0.9, 3)])
    submit = world.reader.submit

    def interrupted(read, ahead=False):
        submit(read, ahead)
        raise KeyboardInterrupt

    world.reader.submit = interrupted
    with pytest.raises(KeyboardInterrupt):
        world.token(0, [RoutedExpert(1, 1, 1.0, 3)])
    world.reader.submit = submit
    world.settled()
    assert not world.reader.queue
    assert not world.scheduler.cache.resident_experts(), "what the disk was not asked for is dropped with it"
    world.token(0, [RoutedExpert(1, 1, 1.0, 3)])


def test_a_base_on_its_way_is_waited_for_in_a_later_wave_too():
    """Its refinement finds room only when another expert has been computed."""
    world = World((2, 1, 1), "lfu")
    world.token(1, [RoutedExpert(2, 1, 0.5, 2)])
    world.prefetch(0, [Prediction(0, 0, 1.0, 1)])
    world.token(1, [RoutedExpert(0, 1, 0.1, 2), RoutedExpert(2, 1, 0.9, 1)])
    world.settled()


def test_a_prefetch_that_fails_is_told_to_who_wants_it():
    world = World((4, 4, 4), "score")
    world.prefetch(0, [Prediction(0, 3, 0.9, 2)])
    world.reader.failing = 1
    world.reader.finish(world.reader.queue[0])
    world.settled()
    assert world.scheduler.cache.resident(1, 3) == 0, "nobody waited for it"
    world.reader.failing = 1
    with pytest.raises(StoreError):
        world.token(1, [RoutedExpert(3, 1, 1.0, 2)])
    world.settled()
    world.token(1, [RoutedExpert(3, 1, 1.0, 2)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 12)), max_size=30))
def test_slots_are_never_lost_nor_given_twice(sequence):
    """Whatever `take` and `release` are interrupted in is done again before anything else, as `Residency` does."""
    arena, held = Arena((3,), (4096,)), set()
    for take, expert, lines in sequence:
        key = SliceKey(0, expert, 0)
        if take and key not in held and len(held) == 3:
            continue
        for left in (lines, 0):
            try:
                with interrupt_after(left):
                    (arena.take if take else arena.release)(key)
                break
            except KeyboardInterrupt:
                pass
        (held.add if take else held.discard)(key)
        assert arena.held() == held
        places = [arena.offset(k) for k in held]
        assert len(set(places)) == len(places)
