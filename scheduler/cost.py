"""Costs of computing and reading on a device: the figures of a profile turned into times."""

# S slices

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from moert.scheduler.profile import Profile
from moert.scheduler.types import Load

# Python's work too, as shares of what planning a layer takes in which something is missing. Looking ahead was timed
# once, on a 12-layer model beside other work; what elastic widths take is an estimate from a profile of the simulator.
_LOOK, _LADDER = 0.27, 0.1


class Costs:
    """Times of a decode step of one token, in seconds.

    sizes: for each layer, bytes of the S slices of an expert, `widths` wide. token_s: once a token. miss_s: for each
    layer in which something is missing. load_s: for each read. dense_s: of each layer, what is not an expert. look_s:
    for each layer behind which somebody looks ahead. ladder_s: for each layer whose widths depend on what is in memory.
    """

    def __init__(
        self, profile: Profile, sizes: Sequence[Sequence[int]], dense_bytes: Sequence[int], widths: Sequence[int]
    ) -> None:
        self.token_s, self.miss_s = profile.token_overhead_s, profile.miss_overhead_s
        self.load_s = profile.load_overhead_s
        self.look_s, self.ladder_s = _LOOK * profile.miss_overhead_s, _LADDER * profile.miss_overhead_s
        self._memory_bytes_per_s = profile.memory_bytes_per_s
        self.sizes = sizes
        self.dense_s = [profile.layer_overhead_s + n * profile.dense_s_per_byte for n in dense_bytes]
        rates = [profile.expert_cost(width) for width in widths]
        self._expert_s = [[total * rate for total, rate in zip(accumulate(row), rates, strict=False)] for row in sizes]

    def expert_s(self, layer: int, slices: int) -> float:
        """Time to compute an expert with so many slices, at least one, once they are in memory."""
        return self._expert_s[layer][slices - 1]

    def traffic_s(self, load: Load) -> float:
        """Return the seconds that computing loses because the bytes of a read go into the same memory that it reads
        weights from.
        """
        return self.nbytes(load) / self._memory_bytes_per_s

    def nbytes(self, load: Load) -> int:
        return sum(self.sizes[load.layer][load.first : load.last])


@dataclass(eq=False, slots=True)
class Read:
    """A read on its way. left: bytes that the disk was not asked for yet. done: when it ended, None before."""

    left: int
    ready: float
    done: float | None = None
    started: bool = False


@dataclass
class Disk:
    """A disk that reads one chunk after the other; a read's first byte comes `latency_s` after it was submitted.

    What somebody waits for goes before what nobody waits for, but a chunk that has begun is read to its end. Many reads
    can be submitted at once: their latencies overlap. All times are absolute.
    """

    bytes_per_s: float
    latency_s: float
    chunk_bytes: float
    free: float = 0.0  # when the last chunk that has begun ends
    busy_s: float = 0.0
    nbytes: int = 0
    _demanded: deque[Read] = field(default_factory=deque)
    _ahead: deque[Read] = field(default_factory=deque)

    def submit(self, now: float, nbytes: int, ahead: bool = False) -> Read:
        self.advance(now)
        read = Read(nbytes, now + self.latency_s)
        (self._ahead if ahead else self._demanded).append(read)
        return read

    def promote(self, now: float, read: Read) -> None:
        """Somebody waits for it now."""
        self.advance(now)
        if read in self._ahead:
            self._ahead.remove(read)
            self._demanded.append(read)

    def cancel(self, now: float, read: Read) -> bool:
        """Drop a read of which nothing was asked from the disk yet; False where it is too late for that."""
        self.advance(now)
        if read.started:
            return False
        for queue in (self._ahead, self._demanded):
            if read in queue:
                queue.remove(read)
        return True

    def advance(self, until: float) -> None:
        """Begin all chunks that begin before `until`."""
        while self._step(until):
            pass

    def wait(self, read: Read) -> float:
        """Return when a read ends, if nothing else is submitted before that. Raises ValueError for one that was
        dropped.
        """
        while read.done is None:
            if not self._step(float("inf")):
                raise ValueError("a read that was dropped never ends")
        return read.done

    def busy_until(self, now: float) -> float:
        """Seconds before `now` in which it read."""
        return self.busy_s - max(0.0, self.free - now)

    def _step(self, until: float) -> bool:
        """Begin the next chunk, if it begins before `until`."""
        queues = [queue for queue in (self._demanded, self._ahead) if queue]
        if not queues:
            return False
        start = max(self.free, min(queue[0].ready for queue in queues))
        if start >= until:
            return False
        queue = next(queue for queue in queues if queue[0].ready <= start)
        read = queue[0]
        size = int(min(read.left, self.chunk_bytes))
        read.left -= size
        read.started = True
        self.free = start + size / self.bytes_per_s
        self.busy_s += size / self.bytes_per_s
        self.nbytes += size
        if read.left == 0:
            read.done = self.free
            queue.popleft()
        return True
