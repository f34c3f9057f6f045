"""A GPU's memory, its bandwidth, copies to it, and products out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from moert.measure.figure import Measured, Progress, measured

BYTES = 256 << 20  # of a copy, and of the weights of a product
REPETITIONS = 5
WIDTH = 16  # torch's product, with weights in half precision; moert's own kernels: gpu_kernels.py


class Gpu(Protocol):
    """The GPU operations that are measured. total_bytes: of its memory; integrated: which is the host's too. The rest
    does something of `BYTES` once and comes back when it is done.
    """

    name: str
    total_bytes: int
    integrated: bool

    def copy_within(self) -> None:
        """Reads them and writes them."""

    def copy_from_host(self) -> None: ...

    def multiply(self) -> None:
        """A vector by weights of so many bytes."""


@dataclass(frozen=True)
class GpuFigures:
    """Figures of a GPU, as `moert.scheduler.profile` names them."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: Measured
    host_to_device_bytes_per_s: Measured
    integrated: bool
    expert_s_per_byte: dict[int, float]
    expert_spread: float


def measure_gpu(gpu: Gpu, host_bytes: int, progress: Progress) -> GpuFigures:
    """host_bytes: memory of the machine. Where it is the GPU's too, it is what counts: CUDA often reports less."""
    progress(f"GPU: {gpu.name}")
    within, copies, products = (_seconds(call) for call in (gpu.copy_within, gpu.copy_from_host, gpu.multiply))
    cost = measured([seconds / BYTES for seconds in products])
    return GpuFigures(
        gpu.name,
        host_bytes if gpu.integrated else gpu.total_bytes,
        measured([2 * BYTES / seconds for seconds in within]),
        measured([BYTES / seconds for seconds in copies]),
        gpu.integrated,
        {WIDTH: cost.value},
        cost.spread,
    )


def _seconds(call: Callable[[], None]) -> list[float]:
    call()
    samples = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


class CudaGpu:
    """The first GPU that torch has."""

    def __init__(self, torch: Any) -> None:
        properties = torch.cuda.get_device_properties(0)
        self._torch = torch
        self.name: str = properties.name
        self.total_bytes: int = properties.total_memory
        self.integrated = bool(properties.is_integrated)
        size = min(BYTES, self.total_bytes // 8)
        self._times = BYTES // size  # a small one does it in several steps
        self._weights = torch.ones(size // 2 // 4096, 4096, dtype=torch.float16, device="cuda")
        self._other = torch.empty_like(self._weights)
        self._vector = torch.ones(4096, dtype=torch.float16, device="cuda")
        self._host = torch.ones(self._weights.shape, dtype=torch.float16).pin_memory()

    def copy_within(self) -> None:
        self._run(lambda: self._other.copy_(self._weights))

    def copy_from_host(self) -> None:
        self._run(lambda: self._other.copy_(self._host, non_blocking=True))

    def multiply(self) -> None:
        self._run(lambda: self._torch.mv(self._weights, self._vector))

    def _run(self, call: Callable[[], object]) -> None:
        for _ in range(self._times):
            call()
        self._torch.cuda.synchronize()


def find_gpu() -> Gpu | None:
    """The one that torch has; None where there is none, or where it cannot be used."""
    import torch

    try:
        return CudaGpu(torch) if torch.cuda.is_available() else None
    except RuntimeError:  # a driver that does not fit, or all of its memory in use
        return None
