"""What the runtime counts about itself."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from moert.runtime.timeline import Timeline
from moert.runtime.transfer import Read
from moert.scheduler.types import Load, SliceKey


@dataclass(slots=True)
class Counters:
    """Sums since the start. expert_uses counts (layer, step, expert); a hit had all its slices in memory when asked.

    token_uses counts (layer, token, expert), by the number of slices that the expert was computed with: what the tokens
    would take one at a time, however many of them a step had. bytes_read: all of them; bytes_prefetched: those that
    nobody waited for when they were asked for, of which bytes_used were wanted afterwards, bytes_wasted were evicted or
    dropped without, and others may still be. waited_s: time in which nothing computed because slices were missing.
    """

    expert_uses: int = 0
    expert_hits: int = 0
    width_sum: int = 0
    reads: int = 0
    bytes_read: int = 0
    bytes_prefetched: int = 0
    bytes_used: int = 0
    bytes_wasted: int = 0
    waited_s: float = 0.0
    computed_s: float = 0.0
    token_uses: Counter[int] = field(default_factory=Counter)

    def copy(self) -> Counters:
        return replace(self, token_uses=self.token_uses.copy())

    def since(self, earlier: Counters) -> Counters:
        """What was counted after `earlier`."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def hit_ratio(self) -> float | None:
        """Share of expert uses that waited for nothing; None where there were none."""
        return self.expert_hits / self.expert_uses if self.expert_uses else None

    @property
    def mean_width(self) -> float | None:
        """Mean bits per weight over expert uses; None where there were none."""
        return self.width_sum / self.expert_uses if self.expert_uses else None


class Telemetry:
    """Is told what happens, and counts; draws it too where there is a timeline."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.counters = Counters()
        self.timeline: Timeline | None = None
        self._bits = (0, *widths)  # by number of slices
        self._unused: dict[SliceKey, int] = {}  # prefetched slices that nobody wanted yet, with their bytes

    def planned(self, layer: int, slices: Mapping[int, int], hits: int, tokens: Iterable[tuple[int, int]]) -> None:
        """slices: of each expert that is computed. tokens: how many (token, expert) there are with so many slices."""
        counters, bits = self.counters, self._bits
        counters.expert_uses += len(slices)
        counters.expert_hits += hits
        counters.width_sum += sum([bits[n] for n in slices.values()])
        if self._unused:
            unused = self._unused
            for key in [(layer, e, i) for e, n in slices.items() for i in range(n) if (layer, e, i) in unused]:
                counters.bytes_used += unused.pop(key)  # type: ignore[call-overload]
        for n, count in tokens:
            counters.token_uses[n] += count

    def asked(self, load: Load, read: Read, ahead: bool) -> None:
        """A read was submitted."""
        if ahead:
            self.counters.bytes_prefetched += read.nbytes
            for index, (_, size, _) in enumerate(read.parts, load.first):
                self._unused[SliceKey(load.layer, load.expert, index)] = size
        self.counters.reads += 1
        self.counters.bytes_read += read.nbytes

    def dropped(self, load: Load, read: Read) -> None:
        """A read that was submitted will not be done."""
        self.counters.reads -= 1
        self.counters.bytes_read -= read.nbytes
        self.counters.bytes_prefetched -= read.nbytes
        for index in range(load.first, load.last):
            self._unused.pop(SliceKey(load.layer, load.expert, index), None)

    def arrived(self, load: Load, read: Read, ahead: bool) -> None:
        if self.timeline is not None:
            name = f"{'prefetch' if ahead else 'load'} {load.layer}.{load.expert} slices {load.first}-{load.last - 1}"
            self.timeline.add("disk", name, read.begun, read.ended, {"bytes": read.nbytes})

    def evicted(self, key: SliceKey) -> None:
        self.counters.bytes_wasted += self._unused.pop(key, 0)

    def waited(self, layer: int, since: float) -> None:
        now = time.perf_counter()
        self.counters.waited_s += now - since
        if self.timeline is not None:
            self.timeline.add("compute", f"wait, layer {layer}", since, now)

    def computed(self, layer: int, experts: int, since: float) -> None:
        now = time.perf_counter()
        self.counters.computed_s += now - since
        if self.timeline is not None:
            self.timeline.add("compute", f"layer {layer}: {experts} experts", since, now)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # ru_maxrss would include a parent's peak from before exec; the kernel's high-water mark does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
