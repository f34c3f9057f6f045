"""The protocol of a device with memory of its own, and devices that need no hardware.

`cuda` has the real one. The two here keep "device memory" in host memory: `EmulatedDevice` computes with the CPU
kernels, `InterpretedDevice` with the GPU's kernels in Triton's interpreter. Their copies are made as late as the
protocol allows, so that computing before a copy is waited for, or reusing its source too early, gives wrong numbers.
"""

# T tokens, D hidden

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moert.errors import DeviceError
from moert.hardware.allocator import allocate
from moert.hardware.memory import available_bytes, total_bytes
from moert.quant.format import ExpertLayout
from moert.quant.matmul import ACTIVATIONS, PackedExpert, experts_ffn


class Copy(Protocol):
    """A copy to the device on its way. span: when it began and ended, in `perf_counter`'s time; None before."""

    @property
    def done(self) -> bool: ...

    @property
    def span(self) -> tuple[float, float] | None: ...

    def wait(self) -> None:
        """Block until the source may be overwritten. Raises DeviceError where the device was lost."""


class ExpertBatches(NamedTuple):
    """Pairs of tokens and the experts in device memory that they meet.

    offsets[e]: where the first slices of expert e begin there; it is used with as many. tokens_of[e]: int64, none
    twice, weights_of[e]: float32 of that length, both on the host.
    """

    offsets: Sequence[Sequence[int]]
    tokens_of: Sequence[Tensor]
    weights_of: Sequence[Tensor]


class DeviceExperts(Protocol):
    """Computes experts whose slices lie in device memory."""

    def add(self, routes: ExpertBatches, x: Tensor, out: Tensor) -> None:
        """Add weights_of[e] * expert_ffn(x[tokens_of[e]]) to out[tokens_of[e]] for all e, and do not wait for it.

        x: float32 contiguous [T, D] on the device; out: the same of the device's `sum_dtype`.
        """


class Device(Protocol):
    """A device whose memory is a tier of its own, or the host's (`integrated`).

    sum_dtype: of what its experts add up to. overhead_bytes: what the device takes of its memory by itself.
    compiles: whether kernels are compiled when they are used first.
    """

    name: str
    kind: str
    integrated: bool
    torch_device: torch.device
    total_bytes: int
    overhead_bytes: int
    sum_dtype: torch.dtype
    compiles: bool

    def guard(self) -> AbstractContextManager[object]:
        """Around anything that uses the device: its errors become DeviceError."""

    def enter_thread(self) -> None:
        """Let this thread use the device from now on, and no other."""

    def limit(self, nbytes: int) -> None:
        """Let all that is allocated from here on take no more. Raises DeviceError where nothing would be left."""

    def available_bytes(self) -> int:
        """Return how much of its memory can still be had."""

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] that begin on a page. Raises DeviceError where there is not so much."""

    def page_lock(self, memory: Tensor) -> Tensor | None:
        """Lock host memory, so that copies come straight out of it; for as long as the device is open.

        Returns the same bytes as the device addresses them (what an integrated device computes with), or None where
        locking is refused: then copies go through a small locked pool.
        """

    def copy(self, source: Tensor, target: Tensor) -> Copy:
        """Begin to copy host memory to device memory, behind the copies begun before; does not block."""

    def after(self, copies: Sequence[Copy]) -> None:
        """Let what is computed from here on wait, on the device, for these copies."""

    def fence(self) -> None:
        """Copies begun from here on wait, on the device, for what is computed so far."""

    def mark(self) -> Any:
        """This point of what is computed, for `when`."""

    def when(self, mark: Any) -> float | None:
        """Return when a mark was reached, in `perf_counter`'s time; None before."""

    def experts(self, layout: ExpertLayout, activation: str, memory: Tensor) -> DeviceExperts:
        """Raises DeviceError where the device cannot compute such experts."""

    def send(self, x: Tensor) -> Tensor:
        """x of the host on the device; for what is computed behind it."""

    def fetch(self, x: Tensor) -> Tensor:
        """x of the device on the host, once it is computed."""

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Record `function` as `moert.models.link.DeviceBackend` says."""

    def synchronise(self) -> None:
        """Wait until all is done. Raises DeviceError where the device was lost."""

    def close(self) -> None:
        """Unlock and free; nothing of it may be used afterwards."""


class _LateCopy:
    def __init__(self, queue: deque[_LateCopy], source: Tensor, target: Tensor) -> None:
        self._queue, self._source, self._target = queue, source, target

        self.span: tuple[float, float] | None = None

    def run(self) -> None:
        before = time.perf_counter()
        self._target.copy_(self._source)
        self.span = before, time.perf_counter()

    @property
    def done(self) -> bool:
        """True from now on once asked for: whoever asks is about to reuse the source."""
        self.wait()
        return True

    def wait(self) -> None:
        while self in self._queue:
            self._queue.popleft().run()


class HostExperts:
    """Experts in host memory, by the CPU kernels."""

    def __init__(self, layout: ExpertLayout, activation: str, memory: Tensor) -> None:
        self._layout, self._activation, self._memory = layout, activation, memory

    def add(self, routes: ExpertBatches, x: Tensor, out: Tensor) -> None:
        layout, memory, (offsets, tokens_of, weights_of) = self._layout, self._memory, routes
        packed = [
            PackedExpert.from_slices(
                [memory[at : at + size] for at, size in zip(starts, layout.slice_sizes, strict=False)], layout
            )
            for starts in offsets
        ]
        parts = torch.empty(sum(map(len, tokens_of)), x.shape[1])
        experts_ffn(x, packed, tokens_of, parts, self._activation)
        sizes = [len(tokens) for tokens in tokens_of]
        for tokens, weights, part in zip(tokens_of, weights_of, torch.split(parts, sizes), strict=True):
            out[tokens] += part.double() * weights[:, None]


class TritonExperts:
    """Nested-bit experts with silu, by the kernels of `moert.quant.triton_kernels`."""

    def __init__(self, layout: ExpertLayout, activation: str, memory: Tensor) -> None:
        if layout.raw or activation != "silu":
            what = "weights that are not nested bits" if layout.raw else f"the activation {activation}"
            raise DeviceError(f"The device has no kernels for {what}: use --device cpu.")
        from moert.quant.placed import PlacedExperts
        from moert.quant.triton_kernels import add_experts

        self._layout, self._memory = layout, memory
        self._placed, self._add = PlacedExperts, add_experts

    def add(self, routes: ExpertBatches, x: Tensor, out: Tensor) -> None:
        placed = self._placed(self._layout, self._memory, routes.offsets)
        self._add(x, placed, routes.tokens_of, routes.weights_of, out)


class EmulatedDevice:
    """Host memory in the place of a device's. capacity: bytes that it pretends to have, None for the machine's."""

    kind = "emulated"
    compiles = False
    sum_dtype = torch.float64  # as the host sums, so that nothing shows where an expert was computed

    def __init__(self, capacity: int | None = None, integrated: bool = False) -> None:
        self.integrated = integrated
        self.name = f"emulated device ({'one memory with the host' if integrated else 'memory of its own'}, no GPU)"
        self.torch_device = torch.device("cpu")
        self.total_bytes, self.overhead_bytes = total_bytes() if capacity is None else capacity, 0
        self._own = self._capacity = capacity
        self._taken = 0
        self._copies: deque[_LateCopy] = deque()

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def enter_thread(self) -> None:
        pass

    def limit(self, nbytes: int) -> None:
        self._capacity = nbytes + self._taken

    def available_bytes(self) -> int:
        return available_bytes() if self._capacity is None else self._capacity - self._taken

    def allocate(self, nbytes: int) -> Tensor:
        if nbytes > self.available_bytes():
            raise DeviceError(
                f"Out of memory on the {self.name}: {nbytes} bytes wanted, {self.available_bytes()} left; give a "
                "smaller --device-budget."
            )
        self._taken += nbytes
        return allocate(nbytes)

    def page_lock(self, memory: Tensor) -> Tensor | None:
        return memory

    def copy(self, source: Tensor, target: Tensor) -> Copy:
        self._copies.append(copy := _LateCopy(self._copies, source, target))
        return copy

    def after(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            copy.wait()

    def fence(self) -> None:
        """Do nothing: what is computed here has ended when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def when(self, mark: float) -> float | None:
        return mark

    def experts(self, layout: ExpertLayout, activation: str, memory: Tensor) -> DeviceExperts:
        if activation not in ACTIVATIONS:
            raise DeviceError(f"The activation {activation} is not known.")
        return HostExperts(layout, activation, memory)

    def send(self, x: Tensor) -> Tensor:
        return x.clone()

    def fetch(self, x: Tensor) -> Tensor:
        return x.clone()

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        kept = function()

        def again() -> tuple[Tensor, ...]:
            for old, new in zip(kept, function(), strict=True):
                old.copy_(new)
            return kept

        return again

    def synchronise(self) -> None:
        while self._copies:
            self._copies.popleft().run()

    def close(self) -> None:
        self._copies.clear()
        self._capacity, self._taken = self._own, 0


class InterpretedDevice(EmulatedDevice):
    """An emulated device that runs the GPU's kernels in Triton's interpreter: TRITON_INTERPRET=1, set before triton is
    loaded.
    """

    kind = "interpreter"
    sum_dtype = torch.float32

    def __init__(self, capacity: int | None = None, integrated: bool = False) -> None:
        super().__init__(capacity, integrated)
        self.name = "emulated device (Triton's interpreter, no GPU)"

    def experts(self, layout: ExpertLayout, activation: str, memory: Tensor) -> DeviceExperts:
        return TritonExperts(layout, activation, memory)


def open_device(kind: str, on_status: Callable[[str], None]) -> Device | None:
    """The device of a kind, as `EngineConfig` names them; None for `cpu`.

    `auto` is a GPU that can be used, or else None, with a line where there is one that cannot. Raises DeviceError where
    a kind that was asked for cannot be used.
    """
    if kind == "emulated":
        return EmulatedDevice()
    if kind == "interpreter":
        return _interpreter()
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return None
    from moert.device.cuda import open_cuda

    try:
        return open_cuda()
    except DeviceError as error:
        if kind == "cuda":
            raise
        on_status(f"warning: the GPU is not used: {error}")
        return None


def _interpreter() -> Device:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError("Triton was loaded before its interpreter was asked for: set TRITON_INTERPRET=1 first.")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import moert.quant.triton_kernels  # noqa: F401
    except ImportError as error:
        raise DeviceError(
            f"Triton's interpreter cannot be used ({error}): install moert[cuda], or use --device emulated."
        ) from None
    return InterpretedDevice()
