"""The split of a layer against the best of all splits, found by trying everything."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.hardware.devices import load_device
from moert.scheduler.assign import CostModel, Task, all_on_device, gains, split

# n tasks, P orders


def optimum(tasks, launch_s=0.0):
    """The least time over all choices of sides and all orders, for a few tasks.

    One order for all four resources is enough: the disk feeds link and host, and in flow shops of up to three machines
    some order that is the same on all of them is optimal (Conway, Maxwell and Miller 1967, 5.2).
    """
    orders = np.array(list(itertools.permutations(range(len(tasks)))))  # [P, n]
    costs = np.array([task[1:] for task in tasks])  # [n, 5]
    best = np.inf
    for sides in itertools.product((False, True), repeat=len(tasks)):
        on_device = np.array(sides)[orders]  # [P, n]
        disk, link, host = (np.zeros(len(orders)) for _ in range(3))
        device = np.full(len(orders), launch_s)
        for at in range(len(tasks)):
            there = on_device[:, at]
            host_s, device_s, move_s, host_read_s, device_read_s = costs[orders[:, at]].T
            read_s = np.where(there, device_read_s, host_read_s)
            disk = disk + read_s
            came = np.where(read_s > 0, disk, 0)
            moving = there & (move_s > 0)
            link = np.where(moving, np.maximum(link, came) + move_s, link)
            came = np.where(moving, link, came)
            device = np.where(there, np.maximum(device, came) + device_s, device)
            host = np.where(there, host, np.maximum(host, came) + host_s)
        ends = np.maximum(host, np.where(on_device.any(1), device, 0))
        best = min(best, ends.min())
    return best


def optimum_without_disk(tasks, launch_s=0.0):
    """Split where all is in host memory: moves in the order that Johnson proved optimal for two machines."""
    early = sorted((t for t in tasks if t.move_s <= t.device_s), key=lambda t: t.move_s)
    late = sorted((t for t in tasks if t.move_s > t.device_s), key=lambda t: -t.device_s)
    best = np.inf
    for sides in itertools.product((False, True), repeat=len(tasks)):
        link = host = 0.0
        device = launch_s
        for t, there in zip(early + late, sides, strict=True):
            if there:
                link += t.move_s
                device = max(device, link if t.move_s else 0.0) + t.device_s
            else:
                host += t.host_s
        best = min(best, max(host, device if any(sides) else 0.0))
    return best


def draw(rng, regime, n):
    """Experts as devices meet them: costs in units of a single token on the host."""
    ratio = rng.choice([0.05, 0.2, 0.5, 1.0, 2.0])  # of the device to the host
    link, disk = rng.choice([0.5, 2.0, 4.0, 10.0]), rng.choice([2.0, 8.0, 20.0])
    tasks = []
    for e in range(n):
        tokens = 1 if regime != "prefill" else int(min(200, rng.paretovariate(0.8)))
        slices = rng.choice([0.5, 0.75, 1.0]) if rng.random() < 0.5 else 1.0
        host, device = slices * (1 + 0.4 * (tokens - 1)), ratio * slices * (1 + 0.02 * (tokens - 1))
        lacking = slices * rng.choice([0, 1, 1, 0.5])
        unread = 0.0
        if regime in ("saturated", "unified") and rng.random() < 0.6:
            unread = slices * rng.choice([1, 0.5]) * disk
        if regime == "unified":
            tasks.append(Task(e, host, device, 0.0, unread, unread))
        else:
            tasks.append(Task(e, host, device, lacking * link, unread, unread if lacking else 0.0))
    return tasks


def ends(tasks, found, launch_s=0.0):
    """When a split really ends, if experts begin in its order: an executor that knows nothing but the costs."""
    by_expert = {t.expert: t for t in tasks}
    steps = [(e, True) for e in found.device] + [(e, False) for e in found.host]
    best = np.inf
    for order in itertools.permutations([(e, there) for e, there in steps if by_expert[e][4 if not there else 5]]):
        read, disk = {}, 0.0
        for e, there in order:
            disk += by_expert[e].device_read_s if there else by_expert[e].host_read_s
            read[e] = disk
        link = host = 0.0
        device = launch_s
        for e in found.device:
            t = by_expert[e]
            came = read.get(e, 0.0)
            if t.move_s:
                link = came = max(link, came) + t.move_s
            device = max(device, came) + t.device_s
        for e in found.host:
            host = max(host, read.get(e, 0.0)) + by_expert[e].host_s
        best = min(best, max(host, device if found.device else 0.0))
    return best


REGIMES = {"decode": (4, 10, 150), "prefill": (4, 10, 150), "saturated": (3, 6, 80), "unified": (3, 6, 80)}


@pytest.mark.parametrize("regime", REGIMES)
def test_no_split_ends_more_than_a_tenth_earlier(regime):
    least, most, cases = REGIMES[regime]
    rng = random.Random(11)
    for _ in range(cases):
        tasks = draw(rng, regime, rng.randint(least, most))
        launch_s = rng.choice([0.0, 0.3])
        best = (optimum_without_disk if regime in ("decode", "prefill") else optimum)(tasks, launch_s)
        found = split(tasks, launch_s)
        assert sorted(found.device + found.host) == [t.expert for t in tasks]
        assert best * (1 - 1e-9) <= found.seconds <= 1.1 * best, tasks
        assert ends(tasks, found, launch_s) <= found.seconds * (1 + 1e-9)
        baseline = all_on_device(tasks, launch_s)
        assert not baseline.host
        assert found.seconds <= baseline.seconds * (1 + 1e-9) or found.seconds <= 1.1 * best


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(REGIMES)), st.integers(1, 6), st.randoms(use_true_random=False), st.floats(0, 1))
def test_whatever_is_drawn_no_split_ends_much_earlier(regime, n, rng, launch_s):
    tasks = draw(rng, regime, n)
    found, best = split(tasks, launch_s), optimum(tasks, launch_s)
    assert sorted(found.device + found.host) == [t.expert for t in tasks]
    assert best * (1 - 1e-9) <= found.seconds <= 1.1 * best
    assert found == split(tasks[::-1], launch_s)


def test_a_split_by_hand():
    """Three are there and take the device 1 s each, the host 4 s; others take 5 s to move."""
    there = [Task(e, 4.0, 1.0) for e in range(3)]
    assert split(there) == ((0, 1, 2), (), 3.0)
    more = [*there, Task(3, 4.0, 1.0, move_s=5.0)]
    assert split(more) == ((0, 1, 2), (3,), 4.0)
    two = [*more, Task(4, 4.0, 1.0, move_s=5.0)]
    assert split(two).seconds == 6.0  # host: one, 4 s; moved meanwhile: the other, 5 + 1 s
    assert len(split(two).host) == 1
    assert all_on_device(two) == ((0, 1, 2, 3, 4), (), 11.0)
    # What takes nothing to move or read, and is slower on the device, stays on the host.
    assert split([Task(0, 1.0, 9.0)]).host == (0,)
    assert split([]) == ((), (), 0.0)
    # A read of 10 s feeds both: the host is not kept from what is there.
    read = [Task(0, 2.0, 1.0, 1.0, 10.0, 10.0), Task(1, 2.0, 9.0)]
    assert split(read).seconds == 12.0


def test_a_move_that_saves_nothing_is_not_made():
    """The read of expert 1 takes longer than all else, so expert 0 can as well stay on the host."""
    tasks = [Task(0, 1.0, 0.1, 2.0), Task(1, 1.0, 0.1, 2.0, 30.0, 30.0)]
    assert split(tasks).device == ()


def test_gains_are_what_a_layer_ends_sooner():
    """Both on the host take 8 s; one moved before ends at 4 s, whichever it is: half as likely, half the gain."""
    tasks = [Task(0, 4.0, 1.0, 50.0), Task(1, 4.0, 1.0, 50.0), Task(2, 4.0, 1.0), Task(3, 4.0, 1.0, 50.0, 9.0, 9.0)]
    found = gains(tasks, {0: 1.0, 1: 0.5, 2: 1.0, 3: 1.0})
    assert set(found) == {0, 1}  # 2 is there, 3 is not in host memory
    rest = [t for t in tasks if t.expert != 0]
    expected = optimum(tasks) - optimum([*rest, tasks[0]._replace(move_s=0.0)])
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(expected / 2)
    alone = gains(tasks[:2], {0: 1.0}, decide=all_on_device)
    assert alone[0] == pytest.approx(101 - 51)


def test_paces_are_the_figures_of_the_profile():
    profile = dataclasses.replace(load_device("laptop-rtx-4060-8gb"), gpu_prefill_macs_per_s={4: 1e12})
    cost_model = CostModel(profile, (2, 3, 4), (2250, 1250, 1250), unified=False)  # 8000 weights
    t = cost_model.task(7, 1, 3, 0, 0)
    assert t.expert == 7
    assert t.host_s == pytest.approx(4750 * profile.expert_s_per_byte[4])
    assert t.device_s == pytest.approx(4750 * profile.gpu_expert_s_per_byte[4])
    assert t.move_s == pytest.approx(profile.host_to_device_latency_s + 4750 / profile.host_to_device_bytes_per_s)
    assert t.host_read_s == t.device_read_s == pytest.approx(4750 / profile.disk_bytes_per_s)
    partly = cost_model.task(7, 101, 2, 1, 2)
    assert partly.host_s == pytest.approx(
        3500 * profile.expert_s_per_byte[3] + 100 * 8000 / profile.prefill_macs_per_s[3]
    )
    assert partly.move_s == pytest.approx(profile.host_to_device_latency_s + 1250 / profile.host_to_device_bytes_per_s)
    assert partly.host_read_s == partly.device_read_s == 0
    many, one = cost_model.task(0, 101, 3, 0, 0), cost_model.task(0, 1, 3, 0, 0)
    assert many.device_s - one.device_s == pytest.approx(100 * 8000 / 1e12)
    there = cost_model.task(0, 1, 3, 3, 0)
    assert there.move_s == there.device_read_s == 0 < there.host_read_s
    unified = CostModel(profile, (2, 3, 4), (2250, 1250, 1250), unified=True).task(0, 1, 3, 1, 1)
    assert unified.move_s == 0
    assert unified.host_read_s == unified.device_read_s == pytest.approx(2500 / profile.disk_bytes_per_s)


def test_without_figures_of_a_gpu_the_device_computes_as_the_host():
    profile = load_device("server-2-core-amx")
    assert profile.gpu_memory_bytes is None
    task = CostModel(profile, (2, 3, 4), (2250, 1250, 1250), unified=False).task(0, 512, 3, 0, 3)
    assert task.device_s == task.host_s
    assert task.move_s > 4750 / profile.memory_bytes_per_s


def test_paces_follow_what_is_measured_within_bounds():
    cost_model = CostModel(load_device("laptop-rtx-4060-8gb"), (4,), (1 << 20,), unified=False)
    first = cost_model.task(0, 1, 1, 0, 0)
    for _ in range(200):
        cost_model.measured("device", cost_model.task(0, 1, 1, 0, 0).device_s, 3 * first.device_s)
        cost_model.measured("move", cost_model.task(0, 1, 1, 0, 0).move_s, first.move_s / 2)
    now = cost_model.task(0, 1, 1, 0, 0)
    assert now.device_s == pytest.approx(3 * first.device_s, rel=0.1)
    assert now.move_s == pytest.approx(first.move_s / 2, rel=0.1)
    assert (now.host_s, now.host_read_s) == (first.host_s, first.host_read_s)
    for _ in range(1000):
        cost_model.measured("host", 1e-9, 1e9)
    assert cost_model.task(0, 1, 1, 0, 0).host_s <= 100 * first.host_s
    cost_model.measured("host", 0.0, 1.0)  # says nothing
    before = cost_model.task(0, 1, 1, 0, 0)
    cost_model.measured("read", 1.0, 1.01)  # too little to plan anew for
    assert cost_model.task(0, 1, 1, 0, 0) == before
