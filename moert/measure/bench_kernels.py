"""Measures the machine: how fast its memory is read, and how fast each kernel computes experts out of it.

Prints nothing. Knows nothing of models or stores: the experts are random bytes.
"""

# T tokens of each expert, D hidden, F expert inner size

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import moert
from moert.errors import MoertError, UsageError
from moert.hardware.memory import available_bytes
from moert.quant import dispatch
from moert.quant.dispatch import Kernel
from moert.quant.format import LINEAR, RAW_DTYPE_BYTES, SLICE_ALIGN, TRELLIS, ExpertLayout, MatrixLayout
from moert.quant.matmul import PackedExpert, experts_ffn

BUFFER_BYTES = 1 << 30  # read from memory, not from a last-level cache, of which some machines have hundreds of MiB
HIDDEN, INNER = 2048, 768  # those of Qwen3-30B-A3B
TOKENS = (1, 128)
EXPERTS_PER_CALL = 8  # as many as a token is routed to
SAMPLE_SECONDS = 0.1  # a sample takes at least this long
_READS = 9
# Each width alone, and the widths of the default store, which are read as several slices; these in both codes.
NESTED = (2, 3, 4)
STORED = (*(((b,), LINEAR) for b in range(2, 9)), (NESTED, LINEAR), (NESTED, TRELLIS))
_MIB = 1 << 20


def matrix_bytes(layout: MatrixLayout, slices: int) -> int:
    """Bytes that a product at the width of the first `slices` slices reads: their codes, and the last one's scales.

    With the padding of odd shapes, which is read too.
    """
    return sum(layout.codes_bytes(i) for i in range(slices)) + layout.scales_bytes()


def expert_bytes(layout: ExpertLayout, slices: int) -> int:
    """Bytes that one expert reads at the width of its first `slices` slices."""
    if layout.raw:
        return sum(n * k for n, k in layout.shapes) * RAW_DTYPE_BYTES[layout.raw_dtype]
    return sum(matrix_bytes(matrix, slices) for matrix in layout.matrices)


def load_average() -> float | None:
    """Processes that ran or wanted to, over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def timestamp() -> str:
    """Now, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_bandwidths(threads: int, size: int) -> list[float]:
    """Bytes per second at which `threads` threads read a buffer of `size` bytes, several tries of the fastest of a few
    loops: the one with the best median, as the speeds that it is compared with are what the machine usually does."""
    torch.set_num_threads(threads)
    columns = 4096
    data = torch.ones(max(size // (4 * columns), 2) & ~1, columns)
    vector = torch.ones(columns)
    half = data.view(2, -1)
    loops: tuple[Callable[[], object], ...] = (
        data.sum,
        lambda: torch.mv(data, vector),
        lambda: torch.dot(half[0], half[1]),
    )
    seconds = [[_seconds(loop) for loop in loops] for _ in range(_READS)]
    return [data.nbytes / tried for tried in min(zip(*seconds, strict=True), key=statistics.median)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory_bandwidths(threads: int, size: int = BUFFER_BYTES) -> list[float]:
    """`read_bandwidths` in a process of its own: the buffer does not count as memory of the one that is measured.

    The buffer is smaller where less than twice its size is available. Raises MoertError if the process fails.
    """
    size = min(size, available_bytes() // 2)
    code = f"from moert.measure.bench_kernels import read_bandwidths; print(*read_bandwidths({threads}, {size}))"
    env = {**os.environ, "PYTHONPATH": str(Path(moert.__file__).parents[1])}
    # In a session of its own, so that Ctrl-C ends it through this process alone, without a traceback of its own.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=env, start_new_session=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MoertError(f"The memory bandwidth could not be measured: {reason.rstrip('.')}.")
    return [float(text) for text in done.stdout.split()]


def memory_bandwidth(threads: int, size: int = BUFFER_BYTES) -> float:
    """The median of `memory_bandwidths`."""
    return statistics.median(memory_bandwidths(threads, size))


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One row. The figures are those of the median of samples_s: seconds for one expert (gate, up, down) and T tokens.

    widths: those stored, in this code; width: the one in use. weights_per_s: weights times tokens. bytes_per_s: of
    weights at that width, read once for all tokens; bandwidth_share: of the measured memory bandwidth.
    """

    kernel: str
    threads: int
    widths: str
    code: str
    width: int
    n_tokens: int
    hidden: int
    inner: int
    group_size: int
    buffer_bytes: int
    repetitions: int
    weights_per_s: float
    bytes_per_s: float
    bandwidth_share: float
    memory_bandwidth_bytes_per_s: float
    samples_s: list[float]
    load_average: float | None
    timestamp: str


class ExpertPool:
    """Experts of one layout at one width, side by side in a buffer, taken in turn so that none is in a cache."""

    def __init__(self, buffer: torch.Tensor, layout: ExpertLayout, slices: int) -> None:
        sizes = layout.slice_sizes[:slices]
        self.experts = []
        for start in range(0, len(buffer) - sum(sizes) + 1, sum(sizes)):
            parts = torch.split(buffer[start : start + sum(sizes)], list(sizes))
            expert = PackedExpert.from_slices(parts, layout)
            if Kernel.REFERENCE not in kernels():
                _ = expert.native  # made at its first use, which shall not be timed
            self.experts.append(expert)
        if not self.experts:
            raise UsageError(
                f"A buffer of {len(buffer)} bytes holds no expert of {sum(sizes)} bytes: give a larger --size."
            )
        self._turn = itertools.cycle(self.experts)

    def take(self, count: int) -> list[PackedExpert]:
        return list(itertools.islice(self._turn, count))


def random_buffer(size: int) -> torch.Tensor:
    """uint8 [size] (less where memory is short), on 4096 bytes; any two bytes are a finite, normal fp16 number, as
    scales must be."""
    size = min(size, available_bytes() // 2)
    raw = torch.empty(size + SLICE_ALIGN, dtype=torch.uint8)
    skip = -raw.data_ptr() % SLICE_ALIGN
    buffer = raw[skip : skip + size]
    pattern = torch.randint(0x1000, 0x3C00, (_MIB // 2,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    tile = pattern.view(torch.uint8)
    for start in range(0, size, len(tile)):
        buffer[start : start + len(tile)] = tile[: size - start]
    return buffer


def sample(pool: ExpertPool, x: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds for one expert and the tokens x [T, D], by calls that compute several; out: [experts a call * T, D]."""
    T = len(x)
    every = torch.arange(T)
    count = len(out) // T
    done, start = 0, time.perf_counter()
    while True:
        experts_ffn(x, pool.take(count), [every] * count, out)
        done += count
        elapsed = time.perf_counter() - start
        if elapsed >= SAMPLE_SECONDS:
            return elapsed / done


def kernels() -> list[Kernel]:
    """Return the kernels compiled for this machine, or the torch reference where there are none."""
    available = dispatch.available_kernels()
    return [kernel for kernel in available if kernel != Kernel.REFERENCE or len(available) == 1]


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One layout, used with its first `slices` slices, for `n_tokens` tokens each expert: a row for each kernel."""

    layout: ExpertLayout
    slices: int
    n_tokens: int

    @property
    def width(self) -> int:
        return self.layout.widths[self.slices - 1]

    @property
    def name(self) -> str:
        widths = ",".join(map(str, self.layout.widths))
        code = f" ({self.layout.code})" if self.layout.code != LINEAR else ""
        return f"{self.width} bits of {widths}{code}, {self.n_tokens} token{'s' * (self.n_tokens > 1)}"


def kernel_cases(group_size: int) -> list[KernelCase]:
    """Every width alone and nested, for one token and for many."""
    return [
        KernelCase(layout, slices, tokens)
        for tokens in TOKENS
        for layout in (ExpertLayout(HIDDEN, INNER, group_size, widths, code=code) for widths, code in STORED)
        for slices in range(1, layout.num_slices + 1)
    ]


class KernelMeasurement:
    """Times one case with every kernel in turn. `rows()` is right at any time, so what is interrupted is not lost."""

    def __init__(self, buffer: torch.Tensor, case: KernelCase, threads: int, bandwidth: float) -> None:
        self._case, self._threads, self._bandwidth, self._size = case, threads, bandwidth, len(buffer)
        self._pool = ExpertPool(buffer, case.layout, case.slices)
        self._load, self._time = load_average(), timestamp()
        self._samples: dict[Kernel, list[float]] = {kernel: [] for kernel in kernels()}

    def run(self, repetitions: int, warmup: bool, on_progress: Callable[[str], None]) -> None:
        """Alternate between the kernels, so that what else the machine does meets them alike."""
        case, active = self._case, dispatch.kernel_name()
        x = torch.randn(case.n_tokens, case.layout.hidden, generator=torch.Generator().manual_seed(0))
        out = torch.empty(EXPERTS_PER_CALL * case.n_tokens, case.layout.hidden)
        try:
            for i in range(-int(warmup), repetitions):
                on_progress(f"{case.name}: " + (f"repetition {i + 1} of {repetitions}" if i >= 0 else "warming up"))
                for kernel, samples in self._samples.items():
                    dispatch.set_kernel(kernel)
                    seconds = sample(self._pool, x, out)
                    if i >= 0:
                        samples.append(seconds)
        finally:
            dispatch.set_kernel(active)

    def rows(self) -> Iterator[KernelRow]:
        """Yield the figures measured, kernel by kernel."""
        case, layout = self._case, self._case.layout
        weights = sum(rows * cols for rows, cols in layout.shapes)
        touched = expert_bytes(layout, case.slices)
        for kernel, samples in self._samples.items():
            if not samples:
                continue
            seconds = statistics.median(samples)
            yield KernelRow(
                kernel=str(kernel),
                threads=self._threads,
                widths=",".join(map(str, layout.widths)),
                code=layout.code,
                width=case.width,
                n_tokens=case.n_tokens,
                hidden=layout.hidden,
                inner=layout.inner,
                group_size=layout.group_size,
                buffer_bytes=self._size,
                repetitions=len(samples),
                weights_per_s=weights * case.n_tokens / seconds,
                bytes_per_s=touched / seconds,
                bandwidth_share=touched / seconds / self._bandwidth,
                memory_bandwidth_bytes_per_s=self._bandwidth,
                samples_s=samples,
                load_average=self._load,
                timestamp=self._time,
            )
