"""Decide which of a layer's experts compute on the host and which on the device, so that the latest of all ends
soonest.

HybriMoE (arXiv 2504.05897). Section 4.2, the split of a layer: one list, what is on the device before what is not, each
by falling load; the device takes from the front, the host from the back, and next takes whoever would end earlier.
Here four things work side by side, each at one expert at a time: the disk, the link to the device, the device, and the
host. What the list gives is then improved by moving single experts over. Section 4.3, prefetching: what moves ahead
is what would shorten its layer most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations
from typing import Literal, NamedTuple

from moert.scheduler.capacity import SCALE_BITS
from moert.scheduler.profile import Profile

Resource = Literal["host", "device", "move", "read"]


class Task(NamedTuple):
    """The seconds that one routed expert would take.

    host_s, device_s: to compute it there. move_s: to bring to the device what is missing there (0: all is there).
    host_read_s, device_read_s: to read from disk what is missing in host memory for computing it there, or moving it.
    """

    expert: int
    host_s: float
    device_s: float
    move_s: float = 0.0
    host_read_s: float = 0.0
    device_read_s: float = 0.0


class Split(NamedTuple):
    """A split of experts among host and device.

    device, host: in the order in which they compute; on the device what is there comes first, then what is moved, in
    the order of the moves. seconds: when the last of them, and so of moves and reads, ends.
    """

    device: tuple[int, ...]
    host: tuple[int, ...]
    seconds: float


Decide = Callable[[Sequence[Task], float, float], Split]
Begin = tuple[float, float]  # when the device and the host can begin
Costs = tuple[tuple[float, float, float, float, float], ...]  # of tasks, without their experts
_FEW, _SOME = 10, 16  # among so many experts up to four, among the heaviest so many two change sides together
_NEAR = 0.05  # what is so near to the best that can be is not improved
_LEAST = 1e-3  # less than this share of the time is no improvement
_MOVING = 0.02  # a move must save so much of its time: what it evicts may be wanted again


def all_on_device(tasks: Sequence[Task], launch_s: float = 0.0, fetch_s: float = 0.0) -> Split:
    """The baseline: the host computes nothing."""
    return _split(tasks, (launch_s, fetch_s), False)


def split(tasks: Sequence[Task], launch_s: float = 0.0, fetch_s: float = 0.0) -> Split:
    """HybriMoE's greedy split, then a few experts at a time change sides as long as all then ends earlier.

    launch_s, fetch_s: what the device and the host take before they compute their first. Deterministic. No split of up
    to ten experts was found to end more than 10% earlier by trying all; of the greedy one alone some end 40% earlier.
    """
    return _split(tasks, (launch_s, fetch_s), True)


def _split(tasks: Sequence[Task], begin: Begin, hybrid: bool) -> Split:
    ranked = sorted(tasks, key=lambda t: (t[1:], t.expert))
    device, host, seconds = _decide(tuple([t[1:] for t in ranked]), begin, hybrid)
    return Split(tuple([ranked[i].expert for i in device]), tuple([ranked[i].expert for i in host]), seconds)


@lru_cache(maxsize=4096)  # the same costs come again and again while decoding
def _decide(costs: Costs, begin: Begin, hybrid: bool) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Decide what the device computes, what the host, each in its order, and when all ends."""
    reads = any(cost[3] for cost in costs)
    enough = (1 + _NEAR) * _bound(costs, begin) if hybrid else 0.0
    best: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None
    for lines in [_Timelines(costs, begin, johnson) for johnson in ((False, True) if reads else (True,))]:
        sides = [True] * len(costs)
        if hybrid:
            sides = _improved(costs, lines, _greedy(costs, begin), enough)
        order = lines.order(sides)
        device, host = tuple([i for i in order if sides[i]]), tuple([i for i in order if not sides[i]])
        found = max(lines.ends(sides)[:2]), device, host
        best = found if best is None or found < best else best
        if best[0] <= enough:
            break
    assert best is not None
    return best[1], best[2], best[0]


def _bound(costs: Costs, begin: Begin) -> float:
    """No split ends earlier: it is a mean of when host and device, or host and link, end, by several weights."""
    if not costs:
        return 0.0
    launch_s, fetch_s = begin
    found = sum(min(cost[3], cost[4]) for cost in costs) + min(min(cost[0], cost[1]) for cost in costs)
    alone = fetch_s + sum([cost[0] for cost in costs]), launch_s + sum([cost[1] for cost in costs])
    for weight in (0.1, 0.3, 0.5, 0.7, 0.9):
        other = 1 - weight
        mean = sum([min(weight * cost[0], other * cost[1]) for cost in costs])
        moving = sum([min(weight * cost[0], other * cost[2]) for cost in costs])
        found = max(found, min(*alone, mean + weight * fetch_s + other * launch_s), moving)
    return found


def _improved(costs: Costs, lines: _Timelines, sides: list[bool], enough: float) -> list[bool]:
    """Better sides than these, as far as small changes lead."""

    def value() -> tuple[float, bool]:
        device, host, link = lines.ends(sides)
        return max(device, host) + _MOVING * link, device >= host

    best, late = value()
    better = True
    while better:
        better = False
        for change in _changes(costs, sides, late, best <= enough):
            for i in change:
                sides[i] = not sides[i]
            found, side = value()
            if found < best * (1 - _LEAST):
                best, late, better = found, side, True
                break
            for i in change:
                sides[i] = not sides[i]
    return sides


def _changes(costs: Costs, sides: Sequence[bool], late: bool, enough: bool) -> Iterator[tuple[int, ...]]:
    """Tasks to change sides: one, then, if that was not enough, several, of which one is on the side that ends last.

    Of a kind that is on one side two are enough.
    """
    kinds: dict[object, list[int]] = {}
    for i, pair in enumerate(zip(costs, sides, strict=True)):
        kinds.setdefault(pair, []).append(i)
    some = sorted((i for kind in kinds.values() for i in kind[:2]), key=lambda i: -costs[i][0])
    yield from ((i,) for i in some)
    several: list[Iterator[tuple[int, ...]]] = [combinations(() if enough else some[:_SOME], 2)]
    if len(costs) <= _FEW and not enough:
        alike = max(costs)[0] < 2 * min(costs)[0]  # as for single tokens, where four have little to gain
        several += [combinations(some, size) for size in ((3,) if alike else (3, 4))]
    for change in chain.from_iterable(several):
        if any(sides[i] == late for i in change):
            yield change


def _greedy(costs: Costs, begin: Begin) -> list[bool]:
    """HybriMoE's: by falling load of what is not on the device, measured by what its move takes."""

    def place(i: int) -> tuple[bool, float, float]:
        host_s, _, move_s, _, device_read_s = costs[i]
        return bool(move_s or device_read_s), move_s / host_s, -host_s

    row = sorted(range(len(costs)), key=place)
    sides = [False] * len(costs)
    disk = link = 0.0
    device, host = begin
    front, back = 0, len(row) - 1
    while front <= back:
        _, device_s, move_s, _, device_read_s = costs[row[front]]
        host_s, _, _, host_read_s, _ = costs[row[back]]
        read = disk + device_read_s if device_read_s else 0.0
        there = max(link, read) + move_s if move_s else read
        ends = max(device, there) + device_s
        fetched = disk + host_read_s if host_read_s else 0.0
        other = max(host, fetched) + host_s
        if ends <= other:
            sides[row[front]], device, front = True, ends, front + 1
            disk, link = max(disk, read), there if move_s else link
        else:
            host, back, disk = other, back - 1, max(disk, fetched)
    return sides


class _Timelines:
    """Computes when all ends, for any choice of sides, where everything goes through what it needs in one order.

    What needs no read goes first, moves by Johnson's rule for two machines (1954), which is optimal there. Reads go by
    that rule too (johnson), or what has most behind it goes first: one of these is nearly always nearly best.
    """

    def __init__(self, costs: Sequence[Sequence[float]], begin: Begin, johnson: bool) -> None:
        self._costs, self._begin = costs, begin

        def place(read_s: float, move_s: float, behind_s: float) -> tuple[bool, bool, float]:
            first_s, second_s = (read_s, move_s + behind_s) if read_s else (move_s, behind_s)
            late = first_s > second_s or (bool(read_s) and not johnson)
            return bool(read_s), late, -second_s if late else first_s

        entries = []
        for i, (host_s, device_s, move_s, host_read_s, device_read_s) in enumerate(costs):
            entries.append((place(device_read_s, move_s, device_s), i, True))
            entries.append((place(host_read_s, 0.0, host_s), i, False))
        self._order = [(i, side) for _, i, side in sorted(entries)]

    def order(self, sides: Sequence[bool]) -> list[int]:
        """Return all tasks, in the order in which they go through whatever they need."""
        return [i for i, side in self._order if sides[i] == side]

    def ends(self, sides: Sequence[bool]) -> tuple[float, float, float]:
        """Return when the device, the host and the link end."""
        disk = link = device = host = 0.0
        (launch_s, fetch_s), costs = self._begin, self._costs
        for i, side in self._order:
            if sides[i] != side:
                continue
            host_s, device_s, move_s, host_read_s, device_read_s = costs[i]
            if side:
                there = launch_s
                if device_read_s:
                    disk += device_read_s
                    there = max(there, disk)
                if move_s:
                    link = max(link, disk if device_read_s else 0.0) + move_s
                    there = max(there, link)
                device = max(device, there) + device_s
            else:
                there = fetch_s
                if host_read_s:
                    disk += host_read_s
                    there = max(there, disk)
                host = max(host, there) + host_s
        return device, host, link


def gains(
    tasks: Sequence[Task],
    likely: Mapping[int, float],
    launch_s: float = 0.0,
    fetch_s: float = 0.0,
    decide: Decide = split,
) -> dict[int, float]:
    """Seconds by which a layer is expected to end sooner, for each expert that could be moved to the device ahead.

    likely: probability of use by expert. Only those are candidates that are in host memory as a whole. All gains are
    beside what is there now: after one is chosen, ask again. HybriMoE, section 4.3.
    """
    now = decide(tasks, launch_s, fetch_s).seconds
    found: dict[int, float] = {}
    alike: dict[tuple[float, ...], float] = {}
    for i, task in enumerate(tasks):
        if not task.move_s or task.device_read_s or task.expert not in likely:
            continue
        if task[1:] not in alike:
            rest = [*tasks[:i], task._replace(move_s=0.0), *tasks[i + 1 :]]
            alike[task[1:]] = now - decide(rest, launch_s, fetch_s).seconds
        found[task.expert] = likely[task.expert] * alike[task[1:]]
    return found


_RATE, _OUTLIER, _STEP, _MOST = 0.1, 4.0, 1.05, 64.0
_GPU_SHARE = 0.8  # of its memory's bandwidth, where nothing is known of its kernels: what those of the host reach
_LAUNCH_S, _LATENCY_S = 2e-5, 1e-5
# Planning two tiers, as a share of what a layer takes more in which something has to be read: 70 us with `Tiers` on the
# machine of which that is measured, where nothing was read.
_PLANNING = 0.15


class CostModel:
    """The time that experts take, from the figures of a device, corrected by what is measured.

    sizes: bytes of each slice of an expert, `widths` wide. unified: host and device share one memory, so that nothing
    is moved. One token takes its weights' bytes out of memory; each further one its multiply-accumulates.

    Where a profile has no figures of a GPU, the device is taken to compute as the host does, and the link to be half as
    fast as the host's memory; where it only lacks some, kernels are taken to reach 80% of its memory's bandwidth, and
    prompts to gain as much by the device as single tokens do. Measuring corrects all that. plan_s: what planning takes.
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
        self.plan_s = _PLANNING * profile.miss_overhead_s
        self._read_s_per_byte = 1 / profile.disk_bytes_per_s
        self._mean: dict[Resource, float] = {"host": 1.0, "device": 1.0, "move": 1.0, "read": 1.0}
        self._factor = dict(self._mean)

    @property
    def launch_s(self) -> float:
        """Return the seconds of each wave on the device before it computes."""
        return self._launch_s * self._factor["device"]

    @property
    def fetch_s(self) -> float:
        """Return the seconds that the inputs take to the host, and its results back, where it computes beside the
        device.
        """
        return 2 * self._latency_s * self._factor["move"]

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

    def one_token(self, slices: Sequence[int]) -> tuple[float, float]:
        """Return the seconds that the device takes for a token's experts, with so many slices each, and the host for
        the least of them.
        """
        device = sum([self._device[n][0] for n in slices])
        return self.launch_s + device * self._factor["device"], self._host[min(slices)][0] * self._factor["host"]

    def move_s(self, nbytes: int) -> float:
        return (self._latency_s + nbytes * self._move_s_per_byte) * self._factor["move"]

    def measured(self, part: Resource, predicted_s: float, seconds: float) -> None:
        """Learn that what was predicted to take `predicted_s` took `seconds`: a running mean of their ratio, within
        bounds.

        Predictions change in steps, so that costs stay the same for as long as they are nearly right.
        """
        if predicted_s > 0 and seconds > 0:
            ratio = min(max(self._factor[part] * seconds / predicted_s / self._mean[part], 1 / _OUTLIER), _OUTLIER)
            mean = self._mean[part] * ratio**_RATE
            self._mean[part] = mean = min(max(mean, 1 / _MOST), _MOST)
            if not 1 / _STEP < mean / self._factor[part] < _STEP:
                self._factor[part] = mean


def _gpu_cost(profile: Profile, width: int) -> float:
    if profile.gpu_expert_s_per_byte is not None:
        return profile.gpu_expert_cost(width)
    if profile.gpu_memory_bytes_per_s is not None:
        return 1 / (_GPU_SHARE * profile.gpu_memory_bytes_per_s)
    return profile.expert_cost(width)
