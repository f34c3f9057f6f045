"""Brings slices from the store into the arena, and keeps account of what is on its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from moert.quant.expert_table import ExpertTable
from moert.runtime.arena import Arena
from moert.runtime.telemetry import Telemetry
from moert.runtime.transfer import Read, make_reader
from moert.scheduler.types import ExpertKey, Load, SliceKey, Wave
from moert.store.reader import Location, Store


class Loader:
    """Arena, reading threads, and the table of experts that can be computed."""

    def __init__(
        self, store: Store, slots: Sequence[int], activation: str, telemetry: Telemetry, overlap: bool = True
    ) -> None:
        self._store, self._layout = store, store.layout
        self._activation, self._telemetry, self._overlap = activation, telemetry, overlap
        self.arena = Arena(slots, store.layout.slice_sizes)
        self.table = ExpertTable(store.layout, activation, self.arena.memory)
        self.reader = make_reader(self.arena.memory)
        # 1: can be computed. numpy, because torch takes ten times as long to set a number.
        self.present = {layer: np.zeros(len(kept), np.float32) for layer, kept in store.kept.items()}
        self._locations: dict[tuple[int, int], Location] = {}
        self._checked: set[SliceKey] = set()  # a checksum is verified when a slice is read for the first time
        self._in_flight: dict[SliceKey, Read] = {}  # slices whose bytes are not there yet
        self._ahead: dict[Load, Read] = {}  # reads of them that nobody asked for yet
        self._finished: list[Load] = []  # of these, those that have ended
        # Told which slots may be overwritten from now on.
        self.leaving: Callable[[Iterable[SliceKey]], None] = lambda keys: None

    def start(self, load: Load, ahead: bool = False) -> Read:
        """Begin to read; `arrived` when it is done."""
        keys, sizes = _slices(load), self._layout.slice_sizes
        location = self._locations.get(load[:2])
        if location is None:
            location = self._locations[load[:2]] = self._store.location(load.layer, load.expert)
        parts: list[tuple[int, int, int]] = []
        what = f"expert {load.expert} of layer {load.layer}"
        read = Read(location.file, location.offset + sum(sizes[: load.first]), parts, what)
        for key in keys:
            self._in_flight[key] = read  # before it can be taken for filled
            checksum = -1 if key in self._checked else self._store.checksum(*key)
            parts.append((self.arena.take(key), sizes[key[2]], checksum))
        if ahead:
            self._ahead[load] = read
        self.reader.submit(read, ahead)
        self._telemetry.asked(load, read, ahead)
        return read

    def arrived(self, load: Load, read: Read) -> None:
        """What `start` began has ended: its expert can be computed with these slices. Raises what went wrong."""
        read.wait()
        keys = _slices(load)
        self._checked.update(keys)
        ahead = self._ahead.pop(load, None) is not None
        if ahead:
            self._finished.append(load)
        self.table.put(load.layer, load.expert, self.arena.offsets(load.layer, load.expert, load.last))
        self.present[load.layer][load.expert] = 1
        for key in keys:
            self._in_flight.pop(key, None)
        self._telemetry.arrived(load, read, ahead)

    def collect(self) -> list[Load]:
        """Those prefetches that have ended since the last time: their experts can be computed."""
        for load, read in [(load, read) for load, read in self._ahead.items() if read.done]:
            self.arrived(load, read)
        done, self._finished = self._finished, []
        return done

    def unwanted(self, layer: int, experts: Collection[int]) -> list[Load]:
        """Drop prefetches for a layer that did not want them, so far as the disk was not asked yet; returns them."""
        wrong = [load for load in self._ahead if load.layer == layer and load.expert not in experts]
        dropped = [load for load in wrong if self._drop(load)]
        for load in dropped:
            for key in _slices(load):
                self.arena.release(key)
        return dropped

    def release(self, keys: Sequence[SliceKey]) -> None:
        """Free the slots of slices that were evicted; a prefetch that was to fill one is dropped or waited for."""
        evicted = set(keys)
        self.leaving(keys)
        for key in keys:
            if key in self._in_flight:
                load = next(load for load, read in self._ahead.items() if read is self._in_flight[key])
                whole = SliceKey(load.layer, load.expert, load.first) in evicted
                if not (whole and self._drop(load)):
                    self.arrived(load, self._ahead[load])
            self.table.keep(key.layer, key.expert, key.slice)
            if key.slice == 0:
                self.present[key.layer][key.expert] = 0
            self.arena.release(key)
            self._telemetry.evicted(key)

    def _drop(self, load: Load) -> bool:
        """Forget a prefetch, unless the disk was asked for some of it."""
        read = self._ahead[load]
        if not self.reader.cancel(read):
            return False
        del self._ahead[load]
        for key in _slices(load):
            del self._in_flight[key]
        self._telemetry.dropped(load, read)
        return True

    def run(
        self,
        wave: Wave,
        layer: int,
        use: Callable[[dict[int, int]], None],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Do what a wave says; `use` gets experts that can be computed, and with how many slices, as they come.

        meanwhile: what else to do once everything is asked for.
        """
        self.release(wave.evictions)
        reads = [(load, self.start(load)) for load in wave.loads]
        ready = dict.fromkeys(wave.resident, self._layout.num_slices)
        partly = {load.expert: load.first for load in reversed(wave.loads)}
        if wave.awaited:
            in_flight = self._promote(layer, wave.awaited)
            reads = in_flight + reads
            still = {load.expert for load, _ in in_flight}
            ready |= {e: partly.get(e, self._layout.num_slices) for e in wave.awaited if e not in still}
            partly = {e: n for e, n in partly.items() if e not in still}
        ready |= partly
        if meanwhile is not None:
            meanwhile()
        if self._overlap:
            use(ready)
            ready = {}
        while reads:
            before = time.perf_counter()
            for _, read in reads[: 1 if self._overlap else None]:
                read.wait()
            self._telemetry.waited(layer, before)
            behind, rest = set(), []
            for load, read in reads:
                if read.done and load.expert not in behind:
                    self.arrived(load, read)
                    ready[load.expert] = load.last
                else:
                    behind.add(load.expert)  # a refinement is of no use before its base
                    rest.append((load, read))
            reads = rest
            use(ready)
            ready = {}
        if ready:
            use(ready)

    def _promote(self, layer: int, experts: Sequence[int]) -> list[tuple[Load, Read]]:
        """Prefetches of these experts: from now on somebody waits for them."""
        found = [(load, read) for load, read in self._ahead.items() if load.layer == layer and load.expert in experts]
        for _, read in found:
            self.reader.promote(read)
        return found

    def recover(self) -> dict[ExpertKey, int]:
        """Begin afresh with what is surely in the arena, after a step that broke off somewhere.

        Returns how many slices of each expert that is.
        """
        self.reader.drain()
        self.arena.rebuild()
        held = self.arena.held() - self._in_flight.keys()
        prefixes: dict[ExpertKey, int] = {}
        for key in sorted(held):
            owner = ExpertKey(key.layer, key.expert)
            if key.slice == prefixes.get(owner, 0):
                prefixes[owner] = key.slice + 1
        for key in self.arena.held():
            if key in self._in_flight or key.slice >= prefixes.get(ExpertKey(key.layer, key.expert), 0):
                self.arena.release(key)
        self._in_flight.clear()
        self._ahead.clear()
        self._finished.clear()
        self.table = ExpertTable(self._layout, self._activation, self.arena.memory)
        for present in self.present.values():
            present[:] = 0
        for (layer, expert), count in prefixes.items():
            self.present[layer][expert] = 1
            self.table.put(layer, expert, self.arena.offsets(layer, expert, count))
        return prefixes

    def close(self) -> None:
        self.reader.close()


def _slices(load: Load) -> list[SliceKey]:
    return [SliceKey(load.layer, load.expert, index) for index in range(load.first, load.last)]
