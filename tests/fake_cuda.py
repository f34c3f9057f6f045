"""torch.cuda without a GPU: device memory is host memory, and streams run when something waits for them.

Streams do what was given to them in order and as late as they may; an eager one as early as it may. So a wait that is
missing shows as wrong numbers, whichever of the two streams it should hold back.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from moert.device.cuda_api import of_torch


class Stream:
    def __init__(self, cuda, eager=False):
        self.cuda, self.eager, self.work = cuda, eager, deque()
        cuda.streams.append(self)

    def push(self, call, ready=lambda: True):
        self.work.append((call, ready))
        for stream in self.cuda.streams:
            while stream.eager and stream.work and stream.work[0][1]():
                stream.step()

    def step(self):
        call, _ = self.work.popleft()
        call()
        self.cuda.clock += 1

    def wait_event(self, event):
        mark = event.mark
        if mark is not None:
            self.push(mark.reach, lambda: mark.reached is not None)

    def wait_stream(self, other):
        event = self.cuda.Event()
        event.record(other)
        self.wait_event(event)


class Mark:
    """One recording of an event."""

    def __init__(self, stream):
        self.stream, self.reached = stream, None

    def pass_by(self):
        self.reached = self.stream.cuda.clock

    def reach(self):
        while self.reached is None:
            self.stream.step()


class Event:
    def __init__(self, cuda, enable_timing=False):
        self.cuda, self.timing, self.mark = cuda, enable_timing, None

    def record(self, stream=None):
        stream = stream or self.cuda.current_stream()
        self.mark = Mark(stream)
        stream.push(self.mark.pass_by)

    def query(self):
        self.cuda.check()
        if self.mark is None or self.mark.reached is not None:
            return True
        if self.mark.stream.work:
            self.mark.stream.step()  # time goes by
        return False

    def synchronize(self):
        self.cuda.check()
        if self.mark is not None:
            self.mark.reach()

    def elapsed_time(self, other):
        assert self.timing
        assert other.timing
        return float(other.mark.reached - self.mark.reached)


class FakeCuda(TorchFunctionMode):
    """A module like torch.cuda. While it is entered as a mode, copies that need not block go to the current stream.

    fail: raised by whatever touches the device. locked: registered addresses, with their sizes and flags. refuse: what
    cudaHostRegister returns. shift: how many bytes further on the device finds the host's memory.
    """

    def __init__(self, integrated=False, total=1 << 30, eager=""):
        super().__init__()
        self.clock, self.streams, self.eager = 0, [], eager
        self.total, self.used, self.cached, self.allocated = total, 100 << 20, 0, 0
        self.fraction, self.fail, self.init_error, self.refuse = None, None, None, 0
        self.locked, self.probes, self.emptied, self.shift = {}, 0, 0, 0
        self.count, self.version, self.missing = 1, "3.4.0", ""
        self.found = SimpleNamespace(name="Fake GPU", major=8, minor=7, is_integrated=integrated, total_memory=total)
        self.compute = Stream(self, eager == "compute")
        self.current = self.compute
        self.capturing = None  # the memory of graphs, while one is captured

    def api(self):
        return replace(
            of_torch(),
            module=self,
            build="12.6",
            device=torch.device("cpu"),
            empty=self.empty,
            pinned=self.pinned,
            view=self.view,
            address=lambda host: host + self.shift,
            end_pool=self.end_pool,
            probe=self.probe,
            triton=lambda: self.version,
            compiler=lambda: self.missing,
        )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            self.current.push(lambda: args[0].copy_(args[1]))
            return args[0]
        return function(*args, **(kwargs or {}))

    def check(self):
        if self.fail is not None:
            raise self.fail

    def empty(self, nbytes):
        self.check()
        self.allocated += nbytes
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def pinned(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def view(self, holder):
        """Stand for what torch.as_tensor makes of it: a copy, as its address shows, where `shift` is not 0."""
        interface = holder.__cuda_array_interface__
        assert interface["typestr"] == "|u1"
        at = interface["data"][0] - self.shift
        assert self.locked[at][0] == interface["shape"][0]
        return holder._memory

    def end_pool(self, pool):
        if pool is not self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing = None

    def probe(self):
        self.probes += 1
        self.check()

    def init(self):
        if self.init_error is not None:
            raise self.init_error

    def device_count(self):
        return 0 if self.init_error else self.count

    def get_device_properties(self, index):
        return self.found

    def get_arch_list(self):
        return ["sm_80", "sm_90"]

    def mem_get_info(self, device):
        self.check()
        return self.total - self.used - self.allocated - self.cached, self.total

    def memory_allocated(self, device):
        return self.allocated

    def memory_reserved(self, device):
        return self.allocated + self.cached

    def set_per_process_memory_fraction(self, fraction, device):
        self.fraction = fraction

    def Stream(self, device):  # noqa: N802
        return Stream(self, self.eager == "copy")

    def Event(self, enable_timing=False):  # noqa: N802
        return Event(self, enable_timing)

    def current_stream(self, device=None):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, device):
        self.check()
        while any(stream.work for stream in self.streams):
            next(stream for stream in self.streams if stream.work).step()

    def empty_cache(self):
        self.check()
        self.emptied += 1

    def cudart(self):
        return self

    def cudaHostRegister(self, begin, nbytes, flags):  # noqa: N802
        if not self.refuse:
            self.locked[begin] = (nbytes, flags)
        return self.refuse

    def cudaHostUnregister(self, begin):  # noqa: N802
        del self.locked[begin]
        return 0
