"""Owns where every slice is: absent, in flight, resident or in use.

There is one state, that of a `SliceCache`, which the scheduler decides on and changes. Slots, reads, the table of
experts that can be computed, and what a router is told to be in memory are views that follow it, always in this order:

    a slice gets room     state -> slot -> read -> (it ends) -> table, `present` -> state: not in flight any more
    a slice loses it      state -> its read is dropped or waited for -> table, `present` -> slot

What is decided and not done yet stands in the state too (`Orders`), and whatever is done may be done twice. So a step
that breaks off anywhere, by an error or by Ctrl-C, leaves nothing to be rebuilt: `update`, with which every step
begins, does what was left over. Reads that nobody waits for any more go on, and arrive later. A slot is given to
another slice only when nothing computes out of it or writes to it; `before_reuse` waits for those outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import numpy as np

from moert.quant.expert_table import ExpertTable
from moert.runtime.arena import Arena
from moert.runtime.telemetry import Telemetry
from moert.runtime.transfer import Read, make_reader
from moert.scheduler.cache import Orders, SliceCache
from moert.scheduler.types import ExpertKey, Load, SliceKey
from moert.store.reader import Location, Store


class Residency:
    """Couples the state of a cache with slots, reading threads and the table of experts. For one thread.

    present[layer][e]: 1 where expert e can be computed, float32. before_reuse: told which slots may be overwritten from
    now on.
    """

    def __init__(
        self, store: Store, slots: Sequence[int], cache: SliceCache, activation: str, telemetry: Telemetry
    ) -> None:
        self._store, self._layout, self._telemetry = store, store.layout, telemetry
        self.cache = cache
        self._orders = cache.orders = Orders()
        self.arena = Arena(slots, store.layout.slice_sizes)
        self.table = ExpertTable(store.layout, activation, self.arena.memory)
        self.reader = make_reader(self.arena.memory)
        # numpy, because torch takes ten times as long to set a number.
        self.present = {layer: np.zeros(len(kept), np.float32) for layer, kept in store.kept.items()}
        self.before_reuse: Callable[[Sequence[SliceKey]], None] = lambda keys: None
        self._locations: dict[tuple[int, int], Location] = {}
        self._checked: set[SliceKey] = set()  # a checksum is verified when a slice is read for the first time
        self._reads: dict[Load, Read] = {}  # of what is in flight, but for what is among the orders
        self._dropping: Load | None = None  # a read that the disk may just have been told to drop

    def update(self) -> None:
        """Do what a step that broke off left over, and take note of reads that have ended."""
        self.cache.finish()
        if self._dropping is not None:
            self._drop(self._dropping)
        if self._orders.coming:
            self._take_back()
        if self._orders.leaving:
            self._let_go()
        for load in [load for load, read in self._reads.items() if read.done]:
            with suppress(Exception):  # whoever wants it asks for it again, and is told
                self.arrived(load)

    def carry_out(self) -> None:
        """Do what was decided: free the slots of what was evicted, and begin the reads of what was given room."""
        if self._orders.leaving:
            self._let_go()
        for load, ahead in tuple(self._orders.coming.items()):
            self._begin(load, ahead)
            del self._orders.coming[load]

    def _begin(self, load: Load, ahead: bool) -> None:
        layer, expert, first, last = load
        location = self._locations.get((layer, expert))
        if location is None:
            location = self._locations[layer, expert] = self._store.location(layer, expert)
        parts, sizes = [], self._layout.slice_sizes
        for index in range(first, last):
            key = SliceKey(layer, expert, index)
            checksum = -1 if key in self._checked else self._store.checksum(*key)
            parts.append((self.arena.take(key), sizes[index], checksum))
        what = f"expert {expert} of layer {layer}"
        read = self._reads[load] = Read(location.file, location.offset + sum(sizes[:first]), parts, what)
        self.reader.submit(read, ahead)
        self._telemetry.asked(load, read, ahead)

    def done(self, load: Load) -> bool:
        """Tell whether the read of a load has ended."""
        return self._reads[load].done

    def wait(self, load: Load) -> None:
        """Block until the read of a load has ended. Raises what went wrong; then its slices are absent again."""
        read = self._reads[load]
        try:
            read.wait()
        except BaseException:
            if read.error is not None:
                self.cache.cancel(load)
                self._let_go()
            raise

    def arrived(self, load: Load) -> None:
        """Make an expert ready to be computed with the slices of a load, once its read has ended. Raises as `wait`."""
        self.wait(load)
        read, ahead = self._reads[load], load in self.cache.ahead
        layer, expert, first, last = load
        self._checked.update([SliceKey(layer, expert, index) for index in range(first, last)])
        count = self.cache.there(layer, expert, without=load)
        if count:
            self.table.put(layer, expert, self.arena.offsets(layer, expert, count))
            self.present[layer][expert] = 1
        self.cache.arrived(load)
        del self._reads[load]
        self._telemetry.arrived(load, read, ahead)

    def promote(self, layer: int, experts: Sequence[int], besides: Collection[Load]) -> list[Load]:
        """Let the reads in flight of these experts go before others: from now on somebody waits for them.

        Returns what they are, without those `besides`.
        """
        in_flight = self.cache.in_flight
        found = [load for e in experts for load in in_flight.get(ExpertKey(layer, e), ()) if load not in besides]
        for load in found:
            self.reader.promote(self._reads[load])
        return found

    def drop_unwanted(self, layer: int, experts: Collection[int]) -> None:
        """Drop prefetches for a layer that did not want them, so far as the disk was not asked yet."""
        if not self.cache.ahead:
            return
        for load in [load for load in self.cache.ahead if load.layer == layer and load.expert not in experts]:
            self._dropping = load
            self._drop(load)

    def _drop(self, load: Load) -> None:
        read = self._reads.get(load)
        if read is not None and self.reader.cancel(read):
            self.cache.cancel(load)
            self._let_go()
        self._dropping = None

    def _let_go(self) -> None:
        """Free the slots of slices that lost their room."""
        leaving = self._orders.leaving
        keys = tuple(leaving)
        self.before_reuse(keys)
        for key in keys:
            if self._reads:
                self._end_read(key)
            self.table.drop_from(key.layer, key.expert, key.slice)
            if key.slice == 0:
                self.present[key.layer][key.expert] = 0
            self.arena.release(key)
            leaving.pop(key, None)
            self._telemetry.evicted(key)

    def _end_read(self, key: SliceKey) -> None:
        """Let nothing write into the slot of a slice any more."""
        layer, expert, index = key
        for load, read in tuple(self._reads.items()):
            if load.layer != layer or load.expert != expert or not load.first <= index < load.last:
                continue
            if load in self.cache.in_flight.get(ExpertKey(layer, expert), ()):  # slices below it stay
                with suppress(Exception):
                    self.arrived(load)
            elif self.reader.cancel(read):
                del self._reads[load]
                self._telemetry.dropped(load, read)
            else:
                with suppress(Exception):  # nobody wants it
                    read.wait()
                del self._reads[load]

    def _take_back(self) -> None:
        """Give back the room of reads that a step broke off before it had begun them for sure."""
        if any(load in self._reads for load in self._orders.coming):
            # One may be on its way that nobody can wait for. Whatever had not begun is dropped with it.
            self.reader.drain()
            for load, read in tuple(self._reads.items()):
                if load not in self._orders.coming:
                    with suppress(Exception):
                        read.wait()
                    if not read.begun:
                        self.cache.cancel(load)
        for load in tuple(self._orders.coming):
            self.cache.cancel(load)

    def close(self) -> None:
        """End the reading threads."""
        self.reader.close()
