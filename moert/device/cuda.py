"""An NVIDIA GPU as the runtime wants it.

Computing happens on torch's current stream, copies of slices on a stream of their own; events order the two. Memory is
torch's: one block for all slices. What torch takes, that block and all else, is held to a limit by
`set_per_process_memory_fraction`. What CUDA takes besides (its context, the code of kernels) torch does not know: that
is what is in use when nothing is allocated yet, and counted in `overhead_bytes`. On an integrated GPU the host's
memory, once it is page-locked, is device memory.

None of this has run on a device yet: it is tested with streams that behave as CUDA's are documented to.
"""

# T tokens, D hidden, N rows (outputs), K columns (inputs)

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moert.config import format_bytes
from moert.device.backend import Copy, DeviceExperts, ExpertBatches, TritonExperts
from moert.device.cuda_api import Cuda, of_torch, out_of_memory, translated, why_not
from moert.device.staging import StagingPool
from moert.errors import DeviceError
from moert.hardware import memory
from moert.quant.format import SLICE_ALIGN, ExpertLayout
from moert.quant.matmul import ACTIVATIONS, PackedExpert

# Slices that cannot be locked, and activations: enough to have one chunk copied while the next is filled.
_CHUNK_BYTES, _CHUNKS = 4 << 20, 4
_CONTEXT_MOST = 640 << 20  # what is in use beyond this belongs to other programs
# torch takes memory in pieces of 2 and 20 MiB, of which it gives out parts, and some for cuBLAS on each of two streams.
_ROUNDING, _ROUNDING_HOPPER = 64 << 20, 128 << 20  # that are 8 MiB, and from there on 32 (CublasHandlePool.cpp)
_BLOCK_WEIGHTS = 1 << 24  # raw weights that are upcast at a time: 64 MiB
_BASE_SECONDS = 4.0  # for which an event serves others as the base of their times
_WARM_UP, _TRIALS = 3, 10  # calls of what is recorded
_PORTABLE, _MAPPED = 1, 2  # flags of cudaHostRegister


def open_cuda(index: int = 0, cuda: Cuda | None = None) -> CudaDevice:
    """The GPU of this number. Raises DeviceError where it cannot be used."""
    cuda = cuda or of_torch(index)
    reason = why_not(cuda)
    if reason:
        raise DeviceError(f"No GPU can be used, since {reason}, or use --device cpu.")
    return CudaDevice(cuda)


def describe_cuda(cuda: Cuda | None = None) -> tuple[str, str]:
    """A line about the first GPU, "" where none is found, and why moert cannot use it, "" where it can."""
    cuda = cuda or of_torch()
    reason, line = why_not(cuda), ""
    with suppress(RuntimeError, AssertionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what the reason says
        if cuda.build is not None and cuda.module.device_count() > 0:
            found = cuda.module.get_device_properties(cuda.device.index or 0)
            shared = found.is_integrated
            memory = "shares the host's memory" if shared else f"{format_bytes(found.total_memory)} of memory"
            line = f"{found.name}, {memory}, compute capability {found.major}.{found.minor}, CUDA {cuda.build}"
    return line, reason


class _Mark:
    """An event, and an earlier mark from which its time is reckoned: in float32 CUDA has no microseconds of an hour."""

    __slots__ = ("base", "event", "seconds")

    def __init__(self, event: Any, base: _Mark | None = None, seconds: float | None = None) -> None:
        self.event, self.base, self.seconds = event, base, seconds

    def when(self) -> float | None:
        if self.seconds is None and self.base is not None and self.event.query():
            before = self.base.when()
            if before is not None:
                self.seconds = before + float(self.base.event.elapsed_time(self.event)) / 1000
                self.base = None
        return self.seconds


class _CudaCopy:
    """A copy between two marks of the copy stream."""

    __slots__ = ("_begin", "_device", "end")

    def __init__(self, device: CudaDevice, begin: _Mark, end: _Mark) -> None:
        self._device, self._begin, self.end = device, begin, end

    @property
    def done(self) -> bool:
        with self._device.guard():
            return bool(self.end.event.query())

    @property
    def span(self) -> tuple[float, float] | None:
        begin, end = self._device.when(self._begin), self._device.when(self.end)
        return None if begin is None or end is None else (begin, end)

    def wait(self) -> None:
        with self._device.guard():
            self.end.event.synchronize()


class _Mapped:
    """Registered host memory as the device addresses it: version 3 of the CUDA array interface."""

    def __init__(self, address: int, memory: Tensor) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDevice:
    """Implements `Device`. For one thread at a time; `open_cuda` checks first whether it can be used."""

    kind = "cuda"
    sum_dtype = torch.float32
    compiles = True

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._module = cuda, cuda.module
        self.torch_device = cuda.device
        self.name = "the GPU"
        with self.guard():
            torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan for each length anew, at every token
            self.enter_thread()
            found = self._module.get_device_properties(cuda.device.index or 0)
            self.name, self.integrated = str(found.name), bool(found.is_integrated)
            # On an integrated device CUDA reports less than there is, and its memory is the host's, counted there.
            self.total_bytes: int = memory.total_bytes() if self.integrated else found.total_memory
            self._context = 0 if self.integrated else self._in_use()
            self._rounding = _ROUNDING if found.major < 9 else _ROUNDING_HOPPER
            self.overhead_bytes = 0 if self.integrated else self._context + self._rounding
            self._copying = self._module.Stream(cuda.device)
            base = self._module.Event(enable_timing=True)
            base.record(self._stream())
            base.synchronize()
            self._base_s = time.perf_counter()
            self._base = _Mark(base, seconds=self._base_s)  # ties the clock of events to the host's
        self._limit: int | None = None
        self._locked: dict[int, Tensor] = {}
        self._aside: Any = None  # the stream on which graphs are made: each stream would get a workspace of cuBLAS
        self._graphs: Any = None  # the memory that all graphs share, for none runs beside another
        self._recording = True  # until it goes wrong
        self._staged: StagingPool | None = None
        self._passing: StagingPool | None = None

    def guard(self) -> AbstractContextManager[None]:
        """Turn torch's errors on this device into DeviceError."""
        return translated(self.name, self._left)

    def enter_thread(self) -> None:
        """Make it the thread's current device, which Triton launches on."""
        if self.torch_device.type == "cuda":
            self._module.set_device(self.torch_device)

    def limit(self, nbytes: int) -> None:
        """Let what is allocated, before and from here on, and CUDA itself take no more than this of a discrete device.

        Raises DeviceMemoryError where the overhead alone is more.
        """
        if self.integrated:  # the host's budget holds for it
            return
        rest = nbytes - self._context
        if rest <= self._rounding:
            overhead = format_bytes(self.overhead_bytes)
            raise out_of_memory(self.name, f"CUDA itself takes {overhead} of the {format_bytes(nbytes)} allowed")
        self._limit = rest
        self._module.set_per_process_memory_fraction(min(1.0, rest / self.total_bytes), self.torch_device)

    def available_bytes(self) -> int:
        with self.guard():
            return self._left()

    def _left(self) -> int:
        if self.integrated:
            return memory.available_bytes()
        free, _ = self._module.mem_get_info(self.torch_device)
        allocated = self._module.memory_allocated(self.torch_device)
        left = free + self._module.memory_reserved(self.torch_device) - allocated
        return int(left if self._limit is None else max(0, min(left, self._limit - allocated)))

    def allocate(self, nbytes: int) -> Tensor:
        with self.guard():
            left = self._left()
            if nbytes + SLICE_ALIGN > left:
                raise out_of_memory(self.name, f"{format_bytes(nbytes)} wanted, {format_bytes(left)} left")
            block = self._cuda.empty(nbytes + SLICE_ALIGN)
        first = -block.data_ptr() % SLICE_ALIGN
        return block[first : first + nbytes]

    def page_lock(self, memory: Tensor) -> Tensor | None:
        """Page-lock `memory` as the protocol says. All its pages are taken at once: that costs memory, and a second for
        a few GB.
        """
        begin = memory.data_ptr()
        with self.guard():
            if begin not in self._locked:
                # Refused without I/O coherency (Jetsons before Xavier), and by systems that allow only so much.
                if int(self._module.cudart().cudaHostRegister(begin, memory.nbytes, _PORTABLE | _MAPPED)):
                    with suppress(RuntimeError):  # the next launch would find the error that was left behind
                        self._cuda.probe()
                    return None
                self._locked[begin] = memory
            if not self.integrated:
                return memory
            address = self._cuda.address(begin)
            shared = self._cuda.view(_Mapped(address, memory))
            return shared if shared.data_ptr() == address else None  # a copy would not do

    def copy(self, source: Tensor, target: Tensor) -> Copy:
        """Start a copy as the protocol says; where `source` is not locked, blocks while the pool is full."""
        with self.guard():
            begin = self._mark(self._copying)
            if self._is_locked(source):
                with self._module.stream(self._copying):
                    target.copy_(source, non_blocking=True)
            else:
                self._staged = self._staged or StagingPool(self._cuda, _CHUNK_BYTES, _CHUNKS)
                self._staged.send(source, target, self._copying)
            return _CudaCopy(self, begin, self._mark(self._copying))

    def after(self, copies: Sequence[Copy]) -> None:
        with self.guard():
            stream = self._stream()
            for copy in copies:
                assert isinstance(copy, _CudaCopy)
                stream.wait_event(copy.end.event)

    def fence(self) -> None:
        with self.guard():
            self._copying.wait_stream(self._stream())

    def mark(self) -> _Mark:
        with self.guard():
            return self._mark(self._stream())

    def when(self, mark: _Mark) -> float | None:
        with self.guard():
            return mark.when()

    def _mark(self, stream: Any) -> _Mark:
        mark = _Mark(self._module.Event(enable_timing=True), self._base)
        mark.event.record(stream)
        if time.perf_counter() - self._base_s > _BASE_SECONDS and self._base.when() is not None:
            self._base, self._base_s = mark, time.perf_counter()
        return mark

    def experts(self, layout: ExpertLayout, activation: str, memory: Tensor) -> DeviceExperts:
        if layout.raw and activation in ACTIVATIONS:
            return _Guarded(self.guard, RawDeviceExperts(layout, activation, memory, self.send))
        return _Guarded(self.guard, TritonExperts(layout, activation, memory))

    def send(self, x: Tensor) -> Tensor:
        with self.guard():
            target = self._cuda.empty(x.nbytes)
            self._passing = self._passing or StagingPool(self._cuda, _CHUNK_BYTES, _CHUNKS)
            self._passing.send(_bytes_of(x), target, self._stream())
        return target.view(x.dtype).view(x.shape)

    def fetch(self, x: Tensor) -> Tensor:
        with self.guard():
            target = torch.empty(x.shape, dtype=x.dtype)
            self._passing = self._passing or StagingPool(self._cuda, _CHUNK_BYTES, _CHUNKS)
            self._passing.fetch(_bytes_of(x), _bytes_of(target), self._stream())
        return target

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Record `function` as a CUDA graph, where that can be made and is faster."""
        if not self._recording:
            return function
        with self.guard():
            try:
                # torch does not go back to the stream that was current where a capture fails (cuda/graphs.py).
                with self._module.stream(self._stream()):
                    again = self._graph(function)
            except RuntimeError:  # something in it waits for the device, or there is no memory for it
                self._recording = False  # what failed stays marked as being captured: no other could share its memory
                if self._graphs is not None:
                    with suppress(RuntimeError):  # else torch would give back no memory any more where it has none left
                        self._cuda.end_pool(self._graphs)
                return function
            return again if self._seconds(again) < self._seconds(function) else function

    def _graph(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        module = self._module
        self._aside = aside = self._aside or module.Stream(self._cuda.device)
        aside.wait_stream(self._stream())
        try:
            with module.stream(aside):  # what libraries do at their first calls cannot be recorded
                for _ in range(_WARM_UP):
                    function()
        finally:
            self._stream().wait_stream(aside)
        self.synchronise()
        graph = module.CUDAGraph()
        self._graphs = self._graphs or module.graph_pool_handle()
        with module.graph(graph, pool=self._graphs, stream=aside):
            result = function()

        def again() -> tuple[Tensor, ...]:
            graph.replay()
            return result

        return again

    def _seconds(self, function: Callable[[], object]) -> float:
        self.synchronise()
        began = time.perf_counter()
        for _ in range(_TRIALS):
            function()
        self.synchronise()
        return time.perf_counter() - began

    def synchronise(self) -> None:
        with self.guard():
            self._module.synchronize(self.torch_device)

    def close(self) -> None:
        with suppress(DeviceError):  # a lost device has nothing to unlock
            self.synchronise()
        for begin in self._locked:
            self._module.cudart().cudaHostUnregister(begin)
        self._locked.clear()
        self._staged = self._passing = None
        with suppress(DeviceError), self.guard():
            self._module.empty_cache()
            if self._limit is not None:  # torch would hold whoever opens the device next to it
                self._module.set_per_process_memory_fraction(1.0, self.torch_device)

    def _stream(self) -> Any:
        return self._module.current_stream(self.torch_device)

    def _is_locked(self, memory: Tensor) -> bool:
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        return any(at <= begin and end <= at + block.nbytes for at, block in self._locked.items())

    def _in_use(self) -> int:
        free, total = self._module.mem_get_info(self.torch_device)
        return int(min(_CONTEXT_MOST, total - free - self._module.memory_reserved(self.torch_device)))


def _bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


class _Guarded:
    """Experts whose errors are ours."""

    def __init__(self, guard: Callable[[], AbstractContextManager[None]], experts: DeviceExperts) -> None:
        self._guard, self._experts = guard, experts

    def add(self, routes: ExpertBatches, x: Tensor, out: Tensor) -> None:
        with self._guard():
            self._experts.add(routes, x, out)


class RawDeviceExperts:
    """Experts whose weights are kept as they are, by torch: upcast exactly and multiplied in float32, as on the CPU.

    send: host tensors to the device.
    """

    def __init__(self, layout: ExpertLayout, activation: str, memory: Tensor, send: Callable[[Tensor], Tensor]) -> None:
        self._layout, self._activation, self._memory, self._send = layout, ACTIVATIONS[activation], memory, send

    def add(self, routes: ExpertBatches, x: Tensor, out: Tensor) -> None:
        (size,) = self._layout.slice_sizes
        for (start,), tokens, weights in zip(*routes, strict=True):
            if not len(tokens):
                continue
            expert = PackedExpert.from_slices([self._memory[start : start + size]], self._layout)
            index = self._send(tokens)
            v = x[index]
            h = self._activation(_linear(v, expert.gate)).mul_(_linear(v, expert.up))
            out.index_add_(0, index, _linear(h, expert.down).mul_(self._send(weights)[:, None]))


def _linear(x: Tensor, w: Any) -> Tensor:
    """x [T, K] @ w [N, K].T in float32, without all of w in float32 at once."""
    step = max(16, _BLOCK_WEIGHTS // w.shape[1])
    parts = [functional.linear(x, w[first : first + step].float()) for first in range(0, w.shape[0], step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
