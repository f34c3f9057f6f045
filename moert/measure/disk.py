"""Random reads of a disk, past the page cache where it lets them."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moert.config import format_bytes
from moert.errors import ProfileError
from moert.hardware.allocator import allocate
from moert.measure.figure import Measured, Progress, measured
from moert.quant.format import SLICE_ALIGN, ExpertLayout, align
from moert.runtime.disk_speed import PAGE, SAMPLE_SECONDS, STREAM_BYTES, RandomReads, Target, read_sizes
from moert.runtime.transfer import File, Read, make_reader
from moert.scheduler.profile import DiskReads

READERS = (1, 2, 4, 8)
REPETITIONS = 3
SAMPLE_BYTES = 40 << 20  # of a repetition, which ends earlier where the disk is slow
LATENCY_READS = 64
FILE_BYTES = 384 << 20  # of the file that is written where there is no store to read
_IN_FLIGHT = 8  # reads that the runtime has on their way: about as many as a layer misses


@dataclass(frozen=True)
class DiskFigures:
    """bytes_per_s: as the runtime reads. latency_s: of the smallest read. rows: what `disk_reads` holds; spread: the
    widest of them. direct: past the page cache."""

    bytes_per_s: Measured
    latency_s: Measured
    rows: tuple[DiskReads, ...]
    spread: float
    direct: bool


@contextlib.contextmanager
def written_target(folder: Path, layout: ExpertLayout, progress: Progress) -> Iterator[Target]:
    """A file of random bytes in `folder`, gone afterwards. Raises ProfileError where it cannot be written."""
    path = folder / f"moert-profile-{os.getpid()}.tmp"
    try:
        try:
            _write(path, progress)
        except OSError as error:
            raise ProfileError(
                f"{format_bytes(FILE_BYTES)} to read from cannot be written to {folder}: {error.strerror or error}; "
                "name another folder with --disk, or a store with -m."
            ) from None
        what = f"a file of {format_bytes(FILE_BYTES)}"
        yield Target((path,), read_sizes(layout), f"The file {path}", what)
    finally:
        with contextlib.suppress(OSError):  # it is not there, or there is no such folder
            path.unlink()


def _write(path: Path, progress: Progress) -> None:
    free = psutil.disk_usage(str(path.parent)).free
    if free < 2 * FILE_BYTES:
        raise OSError(28, f"only {format_bytes(free)} are free, and it should be twice as much")
    with open(path, "wb") as file:
        for done in range(0, FILE_BYTES, 1 << 20):
            progress(f"disk: writing a file to read from, {done / FILE_BYTES:.0%}")
            file.write(os.urandom(min(1 << 20, FILE_BYTES - done)))  # nothing that a file system could compress
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_disk(target: Target, progress: Progress, seed: int = 0) -> DiskFigures:
    """Read at random. Raises ProfileError where that is not possible. Reads about 3 GB at most."""
    draw = random.Random(seed)
    try:
        return _measure(target, progress, draw)
    except OSError as error:
        raise ProfileError(f"{target.name} cannot be read: {error.strerror or error}.") from None


def _measure(target: Target, progress: Progress, draw: random.Random) -> DiskFigures:
    probe = File(target.files[0])
    direct = probe.direct
    probe.close()
    rows: list[DiskReads] = []
    spreads: list[float] = []
    progress("disk: latency")
    latencies = [RandomReads(target, PAGE, 1, LATENCY_READS * PAGE, draw).run()[1] for _ in range(REPETITIONS)]
    for size in target.sizes:
        for readers in READERS:
            progress(f"disk: {readers} at a time, {format_bytes(size)} each")
            results = [RandomReads(target, size, readers, SAMPLE_BYTES, draw).run() for _ in range(REPETITIONS)]
            speed, latency = measured([r[0] for r in results]), measured([r[1] for r in results])
            spreads += [speed.spread, latency.spread]
            rows.append(DiskReads(readers, size, speed.value, latency.value))
    progress("disk: as the runtime reads")
    streams = [_stream(target, draw) for _ in range(REPETITIONS + 1)][1:]
    return DiskFigures(measured(streams), measured(latencies), tuple(rows), max(spreads), direct)


def _stream(target: Target, draw: random.Random) -> float:
    """Bytes per second of the runtime's own reader, with several reads of all sizes on their way."""
    slot = align(target.sizes[-1], SLICE_ALIGN)
    memory = allocate(slot * _IN_FLIGHT)
    memory.view(torch.int64).fill_(1)  # pages that are there
    reader = make_reader(memory)
    in_flight: deque[Read] = deque()
    done = 0
    try:
        start = time.perf_counter()
        for number in range(max(STREAM_BYTES * len(target.sizes) // sum(target.sizes), 2 * _IN_FLIGHT)):
            if len(in_flight) == _IN_FLIGHT:
                oldest = in_flight.popleft()
                oldest.wait()
                done += oldest.nbytes
            if done and time.perf_counter() - start > 2 * SAMPLE_SECONDS:
                break
            size = target.sizes[number % len(target.sizes)]
            path, offset = target.place(size, draw)
            read = Read(path, offset, [(slot * (number % _IN_FLIGHT), size, -1)], target.name)
            reader.submit(read)
            in_flight.append(read)
        for read in in_flight:
            read.wait()
            done += read.nbytes
        return done / (time.perf_counter() - start)
    finally:
        reader.drain()
        reader.close()
