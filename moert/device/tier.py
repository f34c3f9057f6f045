"""The device tier: slices in device memory, moves to it, and the experts that compute there.

Where device and host have one memory there is nothing to move: the device computes out of the host's arena.
"""

# T tokens, D hidden

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moert.device.backend import Copy, Device, ExpertBatches
from moert.errors import DeviceError
from moert.quant.format import ExpertLayout
from moert.runtime.arena import Arena
from moert.runtime.telemetry import Telemetry
from moert.scheduler.cache import Orders, SliceCache
from moert.scheduler.types import Load, SliceKey, Wave

Measurable = Literal["device", "move"]
_COUNTS = (1, 16, 32, 64)  # of tokens, for which there are kernels


# For each expert, and each number of slices that it is used with: that, its tokens int64, and their weights float32.
Entries: TypeAlias = dict[int, list[tuple[int, Tensor, Tensor]]]


@dataclass(slots=True)
class DeviceWork:
    """The work of the device in a layer: x float32 [T, D] and out of its `sum_dtype`, on the device."""

    layer: int
    x: Tensor
    out: Tensor
    entries: Entries
    marks: list[tuple[Any, Any]] = field(default_factory=list)  # before and behind what is computed
    copies: list[tuple[SliceKey, Copy]] = field(default_factory=list)

    def slices(self, expert: int) -> int:
        """Return with how many an expert is used at most."""
        return max((n for n, _, _ in self.entries.get(expert, ())), default=0)


class DeviceTier:
    """Owns where slices are in the memory of a device, as `Residency` does for the host's.

    slots: of each slice index, and cache: the state that they follow; None where host and device have one memory. A
    slice gets room in this order: state, slot, copy, and, once that has ended, state: not in flight any more; it loses
    it in this order: state, wait for its copy and for what computes, slot. `update` does what a step that broke off
    left over. Raises DeviceError where the memory is not to be had, or the device has no kernels for such experts.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[int] | None,
        layout: ExpertLayout,
        activation: str,
        host: Arena,
        telemetry: Telemetry,
        cache: SliceCache | None,
    ) -> None:
        self.device, self._layout, self._host, self._slots = device, layout, host, slots
        self._telemetry, self._cache, self._orders = telemetry, cache, Orders()
        if cache is not None:
            cache.orders = self._orders
        shared = device.page_lock(host.memory)
        if slots is None:
            if shared is None:
                raise DeviceError(f"{device.name} cannot address the host's memory: use --device cpu.")
            self.arena, memory = host, shared
        else:
            self.arena = Arena(slots, layout.slice_sizes, device.allocate)
            memory = self.arena.memory
        self._experts = device.experts(layout, activation, memory)
        self._copies: dict[SliceKey, Copy] = {}  # that may still be on their way
        self._ahead: dict[Load, list[tuple[SliceKey, Copy]]] = {}  # moves that nobody waits for
        self._watched: deque[tuple[DeviceWork, float, float]] = deque()  # with the seconds predicted
        self._launched = False  # something that may not have ended

    @property
    def unified(self) -> bool:
        """Tell whether host and device have one memory."""
        return self._slots is None

    def update(self) -> None:
        """Do what a step that broke off left over, and take note of moves ahead that have ended."""
        if self._cache is None:
            return
        self._cache.finish()
        if self._orders.coming:
            self.device.synchronise()  # a copy may be on its way that nobody can wait for
            for load in tuple(self._orders.coming):
                self._cache.cancel(load)
        self.let_go()
        for load in [load for load, copies in self._ahead.items() if all(copy.done for _, copy in copies)]:
            self._cache.arrived(load)
            del self._ahead[load]

    def move(self, load: Load, ahead: bool = False) -> list[tuple[SliceKey, Copy]]:
        """Begin to copy slices that were given room, which must lie in the host's arena, the base first.

        What computes with them waits for them by itself: see `launch`. ahead: nobody wants to, yet.
        """
        assert self._cache is not None
        copies, sizes = [], self._layout.slice_sizes
        for index in range(load.first, load.last):
            key = SliceKey(load.layer, load.expert, index)
            source, target = self._host.offset(key), self.arena.take(key)
            copy = self.device.copy(
                self._host.memory[source : source + sizes[index]], self.arena.memory[target : target + sizes[index]]
            )
            self._copies[key] = copy
            copies.append((key, copy))
            self._telemetry.moved(key, sizes[index])
        if ahead:
            self._ahead[load] = copies
            del self._orders.coming[load]
        else:
            self._cache.arrived(load)
        return copies

    def let_go(self) -> None:
        """Free the slots of slices that lost their room on the device."""
        keys = tuple(self._orders.leaving)
        if keys:
            self.device.fence()  # they may be computed with as yet
        for key in keys:
            self.settle([key])
            self.arena.release(key)
            del self._orders.leaving[key]

    def settle(self, keys: Iterable[SliceKey]) -> None:
        """Wait until the host's slots of these slices may be overwritten."""
        keys = tuple(keys)
        if keys and self.unified and self._launched:  # the device may still compute out of them
            self.device.synchronise()
            self._launched = False
        for key in keys:
            copy = self._copies.pop(key, None)
            if copy is not None:
                copy.wait()

    def launch(self, work: DeviceWork, experts: Iterable[int]) -> None:
        """Let the device compute these, as soon as what is moved of them is there."""
        layer, offsets, tokens, weights, copies = work.layer, [], [], [], []
        for e in experts:
            for n, of, weight in work.entries.pop(e, ()):
                offsets.append(self.arena.offsets(layer, e, n))
                tokens.append(of)
                weights.append(weight)
                if self._copies:
                    keys = ((layer, e, index) for index in range(n))
                    copies += [self._copies[key] for key in keys if key in self._copies]  # type: ignore[index]
        if not offsets:
            return
        if copies:
            self.device.after(copies)
        before = self.device.mark()
        self._experts.add(ExpertBatches(offsets, tokens, weights), work.x, work.out)
        work.marks.append((before, self.device.mark()))
        self._launched = True

    def prepare(self) -> None:
        """Have all kernels compiled before anybody waits for them: for single tokens and for blocks of more."""
        hidden = self._layout.hidden
        for count in _COUNTS:
            x = self.device.send(torch.zeros(count, hidden))
            out = torch.zeros_like(x, dtype=self.device.sum_dtype)
            self._experts.add(ExpertBatches([[0]], [torch.arange(count)], [torch.zeros(count)]), x, out)
        self.device.synchronise()

    def watch(self, work: DeviceWork, device_s: float, move_s: float) -> None:
        """Note that all of `work` is on its way: learn later what it takes, of which so much was predicted."""
        self._watched.append((work, device_s, move_s))

    def measured(self) -> list[tuple[Measurable, float, float]]:
        """Return what was watched and has ended since the last time: what it was, predicted and measured seconds."""
        self._copies = {key: copy for key, copy in self._copies.items() if not copy.done}
        found: list[tuple[Measurable, float, float]] = []
        while self._watched:
            work, device_s, move_s = self._watched[0]
            times = [(self.device.when(first), self.device.when(last)) for first, last in work.marks]
            computed = [(first, last) for first, last in times if first is not None and last is not None]
            copied = [copy.span for _, copy in work.copies if copy.span is not None]
            if len(computed) < len(times) or len(copied) < len(work.copies):
                break
            self._watched.popleft()
            if computed:
                found.append(("device", device_s, _total(computed)))
            if copied:
                found.append(("move", move_s, _total(copied)))
            spans = [(key, copy.span) for key, copy in work.copies]
            self._telemetry.on_device(work.layer, computed, [(key, span) for key, span in spans if span is not None])
        return found

    def close(self) -> None:
        self.device.close()


class Moves:
    """Goes through the device waves of a stage, as their slices come to be in host memory.

    held: how many slices of an expert are in host memory.
    """

    def __init__(self, tier: DeviceTier, work: DeviceWork, waves: Iterator[Wave], held: Callable[[int], int]) -> None:
        self._tier, self._work, self._waves, self._held = tier, work, waves, held
        self._loads: list[Load] = []  # of the wave that has begun, those that are not copied yet
        self._waiting: list[int] = []  # and experts that compute without a move
        self.done = False

    def advance(self) -> None:
        """Do what can be done now."""
        tier, work, held = self._tier, self._work, self._held
        while not self.done:
            if not self._loads and not self._waiting:
                wave = next(self._waves, None)
                if wave is None:
                    self.done = True
                    return
                tier.let_go()
                self._loads, moved = list(wave.loads), {load.expert for load in wave.loads}
                self._waiting = [e for e in (*wave.resident, *wave.awaited) if e not in moved]
            ready = [e for e in self._waiting if not tier.unified or held(e) >= work.slices(e)]
            self._waiting = [e for e in self._waiting if e not in ready]
            tier.launch(work, ready)
            now = [load for load in self._loads if held(load.expert) >= load.last]
            for load in now:
                work.copies += tier.move(load)
            self._loads = [load for load in self._loads if load not in now]
            behind = {load.expert for load in self._loads}
            tier.launch(work, dict.fromkeys(load.expert for load in now if load.expert not in behind))
            if self._loads or self._waiting:
                return


def _total(spans: Iterable[tuple[float, float]]) -> float:
    return sum(last - first for first, last in spans)
