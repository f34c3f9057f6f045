"""Measure how fast moert's own kernels compute experts on a GPU, and what launches and copies take."""

# T tokens, D hidden, E experts

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moert.device.backend import Device, ExpertBatches
from moert.device.cuda import open_cuda
from moert.errors import DeviceError
from moert.hardware.allocator import allocate
from moert.measure.bench_kernels import random_buffer
from moert.measure.figure import Measured, Progress, measured
from moert.quant.format import SLICE_ALIGN, ExpertLayout

BUFFER_BYTES = 256 << 20  # more than the caches of most GPUs
MANY_EXPERTS = 64  # computed at once, so that asking for it is a small part
PROMPT_TOKENS, PROMPT_EXPERTS = 512, 4
REPETITIONS = 7


@dataclass(frozen=True)
class KernelFigures:
    """Figures of GPU kernels, as `moert.scheduler.profile` names them; the spread of what has several values is the
    widest.
    """

    expert_s_per_byte: dict[int, float]
    expert_spread: float
    prefill_macs_per_s: dict[int, float]
    prefill_spread: float
    launch_s: Measured
    copy_latency_s: Measured


def find_kernels(
    layout: ExpertLayout, progress: Progress, on_status: Progress, opened: Callable[[], Device] = open_cuda
) -> KernelFigures | None:
    """Measure the kernels; None where they cannot be used on this GPU: `on_status` is told why."""
    try:
        device = opened()
        try:
            return measure_kernels(device, layout, progress)
        finally:
            device.close()
    except DeviceError as error:
        on_status(f"{str(error).rstrip('.')}; torch's kernels were measured instead of moert's")
        return None


def measure_kernels(device: Device, layout: ExpertLayout, progress: Progress) -> KernelFigures:
    """Each width of `layout`. Raises DeviceError where the device cannot do it.

    Decoding: what many experts of one token take longer than one does, by the bytes that they have more. Launching:
    what one takes beyond that.
    """
    buffer = random_buffer(min(BUFFER_BYTES, device.available_bytes() // 4))
    memory = device.page_lock(buffer) if device.integrated else device.allocate(len(buffer))
    if memory is None:
        raise DeviceError(f"{device.name} cannot address the host's memory: use --device cpu.")
    if not device.integrated:
        device.copy(buffer, memory).wait()
    decode, prefill, launch = {}, {}, []
    for slices, width in enumerate(layout.widths, 1):
        progress(f"GPU: experts of {width} bits")
        pool = _Pool(device, layout, slices, memory)
        one, many = pool.seconds(1, 1), pool.seconds(MANY_EXPERTS, 1)
        more = (MANY_EXPERTS - 1) * pool.nbytes
        # Never nothing, however the two were disturbed.
        costs = [max(m - o, m / 10) / more for o, m in zip(one, many, strict=True)]
        decode[width] = measured(costs)
        launch += [max(o - pool.nbytes * decode[width].value, o / 10) for o in one]
        macs = PROMPT_EXPERTS * PROMPT_TOKENS * sum(rows * cols for rows, cols in layout.shapes)
        prefill[width] = measured([macs / seconds for seconds in pool.seconds(PROMPT_EXPERTS, PROMPT_TOKENS)])
    return KernelFigures(
        {width: m.value for width, m in decode.items()},
        max(m.spread for m in decode.values()),
        {width: m.value for width, m in prefill.items()},
        max(m.spread for m in prefill.values()),
        measured(launch),
        measured(_copies(device, memory)),
    )


class _Pool:
    """Experts side by side in device memory, taken in turn so that few are in a cache."""

    def __init__(self, device: Device, layout: ExpertLayout, slices: int, memory: Tensor) -> None:
        sizes = layout.slice_sizes[:slices]
        self.nbytes = sum(sizes)
        self._count = len(memory) // self.nbytes
        if not self._count:
            raise DeviceError(f"{device.name} has no room for one expert of {self.nbytes} bytes: use --device cpu.")
        self._starts = [sum(sizes[:index]) for index in range(slices)]
        self._device, self._hidden, self._next = device, layout.hidden, 0
        self._experts = device.experts(layout, "silu", memory)

    def seconds(self, count: int, tokens: int) -> list[float]:
        """Time so many experts with so many tokens, from asking until they are done."""
        x = self._device.send(torch.randn(tokens, self._hidden, generator=torch.Generator().manual_seed(0)))
        out = self._device.send(torch.zeros(tokens, self._hidden))
        every, weights = [torch.arange(tokens)] * count, [torch.full((tokens,), 1 / count)] * count
        samples = []
        for _ in range(REPETITIONS + 1):  # the first compiles
            offsets = [self._take() for _ in range(count)]
            self._device.synchronise()
            start = time.perf_counter()
            self._experts.add(ExpertBatches(offsets, every, weights), x, out)
            self._device.synchronise()
            samples.append(time.perf_counter() - start)
        return samples[1:]

    def _take(self) -> list[int]:
        self._next = (self._next + 1) % self._count
        return [self._next * self.nbytes + start for start in self._starts]


def _copies(device: Device, memory: Tensor) -> list[float]:
    """Seconds of copies so small that only asking for them takes time."""
    source = allocate(SLICE_ALIGN)  # CUDA locks whole pages
    device.page_lock(source)
    samples = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        device.copy(source, memory[:SLICE_ALIGN]).wait()
        samples.append(time.perf_counter() - start)
    return samples[1:]
