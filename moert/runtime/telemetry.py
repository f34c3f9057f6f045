"""Counters of the runtime about itself."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from moert.runtime.timeline import Spans
from moert.runtime.transfer import Read
from moert.scheduler.types import Load, SliceKey


@dataclass(slots=True)
class Counters:
    """Sums since the start. expert_uses counts (layer, step, expert); a hit had all its slices in memory when asked.

    token_uses counts (layer, token, expert), by the number of slices that the expert was computed with: what the tokens
    would take one at a time, however many of them a step had. bytes_read: all of them; bytes_prefetched: those that
    nobody waited for when they were asked for, of which bytes_used were wanted afterwards, bytes_wasted were evicted or
    dropped without, and others may still be. waited_s: time in which nothing computed because slices were missing.
    computed_s: time in which routed experts computed on the host. device_uses: expert uses that a device computed;
    bytes_moved: from host to device memory.
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
    device_uses: int = 0
    bytes_moved: int = 0
    token_uses: Counter[int] = field(default_factory=Counter)

    def copy(self) -> Counters:
        return replace(self, token_uses=self.token_uses.copy())

    def since(self, earlier: Counters) -> Counters:
        """Return what was counted after `earlier`."""
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def hit_ratio(self) -> float | None:
        """Share of expert uses that waited for nothing; None where there were none."""
        return self.expert_hits / self.expert_uses if self.expert_uses else None

    @property
    def mean_width(self) -> float | None:
        """Mean bits per weight over expert uses; None where there were none."""
        return self.width_sum / self.expert_uses if self.expert_uses else None

    def width_histogram(self, widths: Sequence[int]) -> dict[int, float]:
        """Share of the uses by tokens of each of `widths`, and of 0 bits where experts were left out."""
        total = sum(self.token_uses.values())
        return {(0, *widths)[n]: count / total for n, count in sorted(self.token_uses.items())}

    def per_token(self, tokens: int, widths: Sequence[int]) -> dict[str, Any]:
        """Return what these counters add to `GenerationStats`, by the names of its fields."""
        tokens = max(tokens, 1)
        return {
            "waited_s_per_token": self.waited_s / tokens,
            "computed_s_per_token": self.computed_s / tokens,
            "bytes_on_demand_per_token": (self.bytes_read - self.bytes_prefetched) / tokens,
            "bytes_prefetched_per_token": self.bytes_prefetched / tokens,
            "bytes_prefetched_used_per_token": self.bytes_used / tokens,
            "bytes_prefetched_wasted_per_token": self.bytes_wasted / tokens,
            "bytes_moved_per_token": self.bytes_moved / tokens,
            "device_share": self.device_uses / self.expert_uses if self.expert_uses else None,
            "width_histogram": self.width_histogram(widths),
        }


_numbers = attrgetter(*(f.name for f in fields(Counters) if f.name != "token_uses"))


def total(parts: Iterable[Counters]) -> Counters:
    """Their sum."""
    parts = list(parts)
    numbers: Iterable[Any] = map(sum, zip(*map(_numbers, parts), strict=True))
    result = Counters(*numbers)
    for part in parts:
        result.token_uses.update(part.token_uses)
    return result


class Telemetry:
    """Is told what happens, and counts it for each layer; draws it too where there is a timeline.

    decoding: whether what happens from now on is counted as decoding, or as a prompt.
    """

    def __init__(self, widths: tuple[int, ...], layers: Iterable[int]) -> None:
        self.timeline: Spans | None = None
        self._bits = (0, *widths)  # by number of slices
        self._unused: dict[SliceKey, int] = {}  # prefetched slices that nobody wanted yet, with their bytes
        self._moe_layers = tuple(layers)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self._phases = {decoding: {layer: Counters() for layer in self._moe_layers} for decoding in (False, True)}
        self.decoding = False

    @property
    def decoding(self) -> bool:
        return self._layers is self._phases[True]

    @decoding.setter
    def decoding(self, decoding: bool) -> None:
        self._layers = self._phases[decoding]

    @property
    def counters(self) -> Counters:
        """Sums over all layers."""
        return total(part for layers in self._phases.values() for part in layers.values())

    def of(self, layer: int) -> Counters:
        """Return the counters of a layer that are used now."""
        return self._layers[layer]

    def layers(self, decoding: bool) -> dict[int, Counters]:
        """Return what was counted for the experts of each layer while decoding, or for prompts."""
        return {layer: part.copy() for layer, part in self._phases[decoding].items()}

    def step(self, count: int, first: int | None) -> AbstractContextManager[object]:
        """Enter a forward pass of `count` tokens, from position `first` on or of several sequences."""
        return _NOTHING if self.timeline is None else self.timeline.step(count, first)

    def reached(self, layer: int) -> None:
        """The routed experts of a layer are asked for."""
        if self.timeline is not None:
            self.timeline.dense(f"attention, layer {layer}", time.perf_counter())

    def planned(self, layer: int, slices: Mapping[int, int], hits: int, tokens: Iterable[tuple[int, int]]) -> None:
        """slices: of each expert that is computed. tokens: how many (token, expert) there are with so many slices."""
        counters, bits = self._layers[layer], self._bits
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
        counters = self._layers[load.layer]
        if ahead:
            counters.bytes_prefetched += read.nbytes
            for index, (_, size, _) in enumerate(read.parts, load.first):
                self._unused[SliceKey(load.layer, load.expert, index)] = size
        counters.reads += 1
        counters.bytes_read += read.nbytes

    def dropped(self, load: Load, read: Read) -> None:
        """A read that was submitted will not be done."""
        counters = self._layers[load.layer]
        counters.reads -= 1
        counters.bytes_read -= read.nbytes
        counters.bytes_prefetched -= read.nbytes
        for index in range(load.first, load.last):
            self._unused.pop(SliceKey(load.layer, load.expert, index), None)

    def arrived(self, load: Load, read: Read, ahead: bool) -> None:
        if self.timeline is not None:
            name = f"expert {load.layer}.{load.expert}, slices {load.first} to {load.last - 1}"
            self.timeline.read(name, read.begun, read.ended, read.nbytes, ahead)

    def evicted(self, key: SliceKey) -> None:
        if self._unused:
            self._layers[key.layer].bytes_wasted += self._unused.pop(key, 0)

    def moved(self, key: SliceKey, nbytes: int) -> None:
        """A slice begins to be copied to the device."""
        self._layers[key.layer].bytes_moved += nbytes

    def on_device(
        self,
        layer: int,
        computed: Iterable[tuple[float, float]],
        copied: Iterable[tuple[SliceKey, tuple[float, float]]],
    ) -> None:
        """A device did something for a layer, from when to when: known afterwards."""
        if self.timeline is not None:
            for begin, end in computed:
                self.timeline.device(f"experts, layer {layer}", begin, end)
            for key, span in copied:
                self.timeline.move(f"expert {key.layer}.{key.expert}, slice {key.slice}", *span)

    def waited(self, layer: int, since: float) -> None:
        now = time.perf_counter()
        self._layers[layer].waited_s += now - since
        if self.timeline is not None:
            self.timeline.compute(f"wait, layer {layer}", since, now)

    def computed(self, layer: int, experts: int, since: float) -> None:
        now = time.perf_counter()
        self._layers[layer].computed_s += now - since
        if self.timeline is not None:
            self.timeline.compute(f"experts, layer {layer}: {experts}", since, now)


_NOTHING = nullcontext()


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
