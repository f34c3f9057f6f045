"""The device tier: slices in device memory, moves to it, and the experts that compute there.

Where device and host have one memory there is nothing to move: the device computes out of the host's arena.
"""

# T tokens, D hidden

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moert.device.backend import Copy, Device, ExpertBatches
from moert.errors import DeviceError
from moert.quant.format import ExpertLayout
from moert.runtime.arena import Arena
from moert.runtime.telemetry import Telemetry
from moert.scheduler.types import Load, SliceKey, Wave

Measurable = Literal["device", "move"]
_COUNTS = (1, 16, 32, 64)  # of tokens, for which there are kernels


# For each expert, and each number of slices that it is used with: that, its tokens int64, and their weights float32.
Entries: TypeAlias = dict[int, list[tuple[int, Tensor, Tensor]]]


@dataclass(slots=True)
class DeviceWork:
    """What the device computes of a layer: x float32 [T, D] and out of its `sum_dtype`, on the device."""

    layer: int
    x: Tensor
    out: Tensor
    entries: Entries
    marks: list[tuple[Any, Any]] = field(default_factory=list)  # before and behind what is computed
    copies: list[tuple[SliceKey, Copy]] = field(default_factory=list)

    def slices(self, expert: int) -> int:
        """With how many it is used at most."""
        return max((n for n, _, _ in self.entries.get(expert, ())), default=0)


class DeviceTier:
    """Slices in the slots of a device. slots: of each slice index; None where host and device have one memory.

    Raises DeviceError where the memory is not to be had, or the device has no kernels for such experts.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[int] | None,
        layout: ExpertLayout,
        activation: str,
        host: Arena,
        telemetry: Telemetry,
    ) -> None:
        self.device, self._layout, self._host, self._slots = device, layout, host, slots
        self._telemetry = telemetry
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
        self._watched: deque[tuple[DeviceWork, float, float]] = deque()  # with the seconds predicted
        self._launched = False  # something that may not have ended

    @property
    def unified(self) -> bool:
        """Whether host and device have one memory."""
        return self._slots is None

    def move(self, load: Load) -> list[tuple[SliceKey, Copy]]:
        """Begin to copy slices, which must lie in the host's arena, the base first."""
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
        return copies

    def release(self, keys: Sequence[SliceKey]) -> None:
        """Free the slots of slices that were evicted from the device."""
        if keys:
            self.device.fence()  # they may be computed with as yet
        for key in keys:
            self.settle([key])
            self.arena.release(key)

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

    def launch(self, part: DeviceWork, experts: Iterable[int]) -> None:
        """Let the device compute these, as soon as what is moved of them is there."""
        layer, offsets, tokens, weights, copies = part.layer, [], [], [], []
        for e in experts:
            for n, of, weight in part.entries.pop(e, ()):
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
        self._experts.add(ExpertBatches(offsets, tokens, weights), part.x, part.out)
        part.marks.append((before, self.device.mark()))
        self._launched = True

    def prepare(self) -> None:
        """Have all kernels compiled before anybody waits for them: for single tokens and for blocks of more."""
        hidden = self._layout.hidden
        for count in _COUNTS:
            x = self.device.send(torch.zeros(count, hidden))
            out = torch.zeros_like(x, dtype=self.device.sum_dtype)
            self._experts.add(ExpertBatches([[0]], [torch.arange(count)], [torch.zeros(count)]), x, out)
        self.device.synchronise()

    def watch(self, part: DeviceWork, device_s: float, move_s: float) -> None:
        """All of `part` is on its way: learn later what it takes, of which so much was predicted."""
        self._watched.append((part, device_s, move_s))

    def measured(self) -> list[tuple[Measurable, float, float]]:
        """What was watched and has ended since the last time: what it was, predicted and measured seconds."""
        self._copies = {key: copy for key, copy in self._copies.items() if not copy.done}
        found: list[tuple[Measurable, float, float]] = []
        while self._watched:
            part, device_s, move_s = self._watched[0]
            times = [(self.device.when(first), self.device.when(last)) for first, last in part.marks]
            computed = [(first, last) for first, last in times if first is not None and last is not None]
            copied = [copy.span for _, copy in part.copies if copy.span is not None]
            if len(computed) < len(times) or len(copied) < len(part.copies):
                break
            self._watched.popleft()
            if computed:
                found.append(("device", device_s, _total(computed)))
            if copied:
                found.append(("move", move_s, _total(copied)))
            self._telemetry.on_device(part.layer, computed, part.copies)
        return found

    def restart(self) -> None:
        """Begin afresh, empty, after a step that broke off somewhere."""
        self.device.synchronise()
        self._copies.clear()
        self._watched.clear()
        if not self.unified:
            self.arena.rebuild()
            for key in self.arena.held():
                self.arena.release(key)

    def close(self) -> None:
        self.device.close()


class Moves:
    """Goes through the device waves of a stage, as their slices come to be in host memory."""

    def __init__(self, tier: DeviceTier, part: DeviceWork, waves: Sequence[Wave]) -> None:
        self._tier, self._part, self._waves = tier, part, deque(waves)
        self._begun = False  # the first of these waves
        self._loads: list[Load] = []  # of it, those that are not copied yet
        self._waiting: list[int] = []  # and experts that compute without a move

    @property
    def done(self) -> bool:
        return not self._waves

    def advance(self, held: Callable[[int], int]) -> None:
        """Do what can be done now. held: how many slices of an expert are in host memory."""
        while self._waves:
            wave, part, tier = self._waves[0], self._part, self._tier
            if not self._begun:
                tier.release(wave.evictions)
                self._loads, moved = list(wave.loads), {load.expert for load in wave.loads}
                self._waiting = [e for e in (*wave.resident, *wave.awaited) if e not in moved]
                self._begun = True
            ready = [e for e in self._waiting if not tier.unified or held(e) >= part.slices(e)]
            self._waiting = [e for e in self._waiting if e not in ready]
            tier.launch(part, ready)
            now = [load for load in self._loads if held(load.expert) >= load.last]
            for load in now:
                part.copies += tier.move(load)
            self._loads = [load for load in self._loads if load not in now]
            behind = {load.expert for load in self._loads}
            tier.launch(part, dict.fromkeys(load.expert for load in now if load.expert not in behind))
            if self._loads or self._waiting:
                return
            self._waves.popleft()
            self._begun = False


def _total(spans: Iterable[tuple[float, float]]) -> float:
    return sum(last - first for first, last in spans)
