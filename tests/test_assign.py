"""The split of a layer against the best of all splits, found by trying everything."""

import itertools

import numpy as np

from moert.scheduler.assign import Task

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
    """The same where all is in host memory: moves in the order that Johnson proved optimal for two machines."""
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
        tokens = 1 if regime != "prefill" else min(200, int(rng.paretovariate(0.8)))
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
