"""Which of a layer's experts compute on the host and which on the device, so that the latest of all ends soonest.

HybriMoE (arXiv 2504.05897). Section 4.2, the split of a layer: one list, what is on the device before what is not, each
by falling load; the device takes from the front, the host from the back, and next takes whoever would end earlier.
Here four things work side by side, each at one expert at a time: the disk, the link to the device, the device, and the
host. What the list gives is then improved by moving single experts over. Section 4.3, prefetching: what moves ahead
is what would shorten its layer most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from moert.scheduler.capacity import SCALE_BITS
from moert.scheduler.profile import Profile

Part = Literal["host", "device", "move", "read"]


class Task(NamedTuple):
    """What one routed expert would take, in seconds.

    host_s, device_s: to compute it there. move_s: to bring to the device what is missing there (0: all is there).
    host_read_s, device_read_s: to read from disk what is missing in host memory for computing it there, or moving it.
    """

    expert: int
    host_s: float
    device_s: float
    move_s: float = 0.0
    host_read_s: float = 0.0
    device_read_s: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether the device can compute it at once."""
        return not self.move_s and not self.device_read_s


class Split(NamedTuple):
    """Where experts compute.

    device, host: in the order in which they compute; on the device what is there comes first, then what is moved, in
    the order of the moves. seconds: when the last of them, and so of moves and reads, ends.
    """

    device: tuple[int, ...]
    host: tuple[int, ...]
    seconds: float


Decide = Callable[[Sequence[Task], float], Split]


def all_on_device(tasks: Sequence[Task], launch_s: float = 0.0) -> Split:
    """The baseline: the host computes nothing."""
    return _Timelines(tasks, launch_s).split([True] * len(tasks))


def split(tasks: Sequence[Task], launch_s: float = 0.0) -> Split:
    """HybriMoE's greedy split, then single experts change sides while that ends earlier.

    launch_s: what the device takes before it computes the first. Deterministic.
    """
    lines = _Timelines(tasks, launch_s)
    sides = _greedy(tasks, launch_s)
    best = lines.ends(sides)
    moved = True
    while moved:
        moved = False
        late = best[0] >= best[1]  # the side that ends last: only what leaves it can help
        for i in [i for i, side in enumerate(sides) if side == late]:
            sides[i] = not late
            found = lines.ends(sides)
            if max(found) < max(best) * (1 - 1e-9):
                best, moved = found, True
                break
            sides[i] = late
    return lines.split(sides)


def _greedy(tasks: Sequence[Task], launch_s: float) -> list[bool]:
    """For each task whether the device computes it."""
    row = sorted(range(len(tasks)), key=lambda i: (not tasks[i].ready, -tasks[i].host_s, tasks[i].expert))
    sides = [False] * len(tasks)
    disk = link = host = 0.0
    device = launch_s
    front, back = 0, len(row) - 1
    while front <= back:
        a, b = tasks[row[front]], tasks[row[back]]
        read = disk + a.device_read_s if a.device_read_s else 0.0
        there = max(link, read) + a.move_s if a.move_s else read
        ends = max(device, there) + a.device_s
        fetched = disk + b.host_read_s if b.host_read_s else 0.0
        other = max(host, fetched) + b.host_s
        if ends <= other:
            sides[row[front]], device, front = True, ends, front + 1
            disk, link = max(disk, read), there if a.move_s else link
        else:
            host, back, disk = other, back - 1, max(disk, fetched)
    return sides


class _Timelines:
    """When all ends, for any choice of sides.

    What needs no read goes first, moves by Johnson's rule for two machines (1954), which is optimal there; reads by
    what is behind them, the longest first.
    """

    def __init__(self, tasks: Sequence[Task], launch_s: float) -> None:
        self._tasks, self._launch_s = tasks, launch_s
        entries: list[tuple[tuple[float, float], int, bool]] = []
        for i, t in enumerate(tasks):
            if t.device_read_s:
                key = 2.0, -t.move_s - t.device_s
            else:
                key = (0.0, t.move_s) if t.move_s <= t.device_s else (1.0, -t.device_s)
            entries.append((key, i, True))
            entries.append(((2.0, -t.host_s) if t.host_read_s else (0.0, -t.host_s), i, False))
        self._order = [(i, side) for _, i, side in sorted(entries)]

    def ends(self, sides: Sequence[bool]) -> tuple[float, float]:
        """When the device and the host end."""
        disk = link = host = 0.0
        device = 0.0
        begin = self._launch_s
        tasks = self._tasks
        for i, side in self._order:
            if sides[i] != side:
                continue
            _, host_s, device_s, move_s, host_read_s, device_read_s = tasks[i]
            if side:
                there = 0.0
                if device_read_s:
                    there = disk = disk + device_read_s
                if move_s:
                    there = link = max(link, there) + move_s
                device = max(device, there, begin) + device_s
            else:
                if host_read_s:
                    disk += host_read_s
                    host = max(host, disk)
                host += host_s
        return device, host

    def split(self, sides: Sequence[bool]) -> Split:
        chosen = [(self._tasks[i].expert, side) for i, side in self._order if sides[i] == side]
        device = tuple(e for e, side in chosen if side)
        return Split(device, tuple(e for e, side in chosen if not side), max(self.ends(sides)))


def gains(
    tasks: Sequence[Task], likely: Mapping[int, float], launch_s: float = 0.0, decide: Decide = split
) -> dict[int, float]:
    """Seconds by which a layer is expected to end sooner, for each expert that could be moved to the device ahead.

    likely: probability of use by expert. Only those are candidates that are in host memory as a whole. All gains are
    beside what is there now: after one is chosen, ask again. HybriMoE, section 4.3.
    """
    now = decide(tasks, launch_s).seconds
    found: dict[int, float] = {}
    alike: dict[tuple[float, ...], float] = {}
    for i, task in enumerate(tasks):
        if not task.move_s or task.device_read_s or task.expert not in likely:
            continue
        if task[1:] not in alike:
            rest = [*tasks[:i], task._replace(move_s=0.0), *tasks[i + 1 :]]
            alike[task[1:]] = now - decide(rest, launch_s).seconds
        found[task.expert] = likely[task.expert] * alike[task[1:]]
    return found


_RATE, _STEP, _MOST = 0.1, 4.0, 64.0
_GPU_SHARE = 0.8  # of its memory's bandwidth, where nothing is known of its kernels: what those of the host reach
_LAUNCH_S, _LATENCY_S = 2e-5, 1e-5


class Pace:
    """What experts take, from the figures of a device, corrected by what is measured.

    sizes: bytes of each slice of an expert, `widths` wide. unified: host and device share one memory, so that nothing
    is moved. One token takes its weights' bytes out of memory; each further one its multiply-accumulates.

    Where a profile has no figures of a GPU, the device is taken to compute as the host does, and the link to be half as
    fast as the host's memory; where it only lacks some, kernels are taken to reach 80% of its memory's bandwidth, and
    prompts to gain as much by the device as single tokens do. Measuring corrects all that.
    """

    def __init__(self, profile: Profile, widths: Sequence[int], sizes: Sequence[int], unified: bool) -> None:
        self._unified = unified
        self._bytes = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
        weights = 8 * self._bytes[-1] / (widths[len(sizes) - 1] + SCALE_BITS * len(sizes))
        host = [profile.expert_cost(width) for width in widths]
        device = [_gpu_cost(profile, width) for width in widths]
        self._host = [(0.0, 0.0)]  # by slices: the first token, each further one
        self._device = [(0.0, 0.0)]
        for n, (width, h, d) in enumerate(zip(widths[: len(sizes)], host, device, strict=False), start=1):
            more = weights / profile.prefill_rate(width)
            rate = (profile.gpu_prefill_macs_per_s or {}).get(width)
            self._host.append((self._bytes[n] * h, more))
            self._device.append((self._bytes[n] * d, weights / rate if rate else more * d / h))
        self._move_s_per_byte = 1 / (profile.host_to_device_bytes_per_s or profile.memory_bytes_per_s / 2)
        latency = profile.host_to_device_latency_s
        self._latency_s = _LATENCY_S if latency is None else latency
        launch = profile.gpu_launch_overhead_s
        self._launch_s = _LAUNCH_S if launch is None else launch
        self._read_s_per_byte = 1 / profile.disk_bytes_per_s
        self._factor: dict[str, float] = dict.fromkeys(("host", "device", "move", "read"), 1.0)

    @property
    def launch_s(self) -> float:
        """Of each wave on the device, before it computes."""
        return self._launch_s * self._factor["device"]

    def task(self, expert: int, tokens: int, slices: int, on_device: int, on_host: int) -> Task:
        """on_device, on_host: how many of the first slices are there."""
        factor, nbytes = self._factor, self._bytes
        first, more = self._host[slices]
        host_s = (first + (tokens - 1) * more) * factor["host"]
        first, more = self._device[slices]
        device_s = (first + (tokens - 1) * more) * factor["device"]
        read_s = (nbytes[slices] - nbytes[min(on_host, slices)]) * self._read_s_per_byte * factor["read"]
        if self._unified:
            return Task(expert, host_s, device_s, 0.0, read_s, read_s)
        if on_device >= slices:
            return Task(expert, host_s, device_s, 0.0, read_s, 0.0)
        return Task(expert, host_s, device_s, self.move_s(nbytes[slices] - nbytes[on_device]), read_s, read_s)

    def move_s(self, nbytes: int) -> float:
        return (self._latency_s + nbytes * self._move_s_per_byte) * self._factor["move"]

    def measured(self, part: Part, predicted_s: float, seconds: float) -> None:
        """What was predicted to take `predicted_s` took `seconds`: a running mean of their ratio, within bounds."""
        if predicted_s > 0 and seconds > 0:
            ratio = min(max(seconds / predicted_s, 1 / _STEP), _STEP)
            factor = self._factor[part] * math.exp(_RATE * math.log(ratio))
            self._factor[part] = min(max(factor, 1 / _MOST), _MOST)


def _gpu_cost(profile: Profile, width: int) -> float:
    if profile.gpu_expert_s_per_byte is not None:
        return profile.gpu_expert_cost(width)
    if profile.gpu_memory_bytes_per_s is not None:
        return 1 / (_GPU_SHARE * profile.gpu_memory_bytes_per_s)
    return profile.expert_cost(width)
