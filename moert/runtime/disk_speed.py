"""Random reads of files as experts are read, and how fast they are."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moert.hardware.allocator import allocate
from moert.quant.format import ExpertLayout
from moert.runtime.transfer import File
from moert.store.fileio import as_bytes
from moert.store.reader import Store

PAGE = 4096
SAMPLE_SECONDS = 0.5  # at most, of one measurement
STREAM_BYTES = 128 << 20  # of a measurement as the runtime reads


@dataclass(frozen=True)
class Target:
    """Files to read at random, and the sizes of reads, ascending multiples of 4096 bytes. name, what: for people, with
    their folder and without."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    name: str
    what: str

    def place(self, size: int, draw: random.Random) -> tuple[Path, int]:
        """A file, and a position in it behind which so many bytes stand."""
        path = draw.choice(self.files)
        return path, draw.randrange((path.stat().st_size - size) // PAGE + 1) * PAGE


def read_sizes(layout: ExpertLayout) -> tuple[int, ...]:
    """Sizes of what is read of an expert: its slices, and all of them together."""
    return tuple(sorted({*layout.slice_sizes, sum(layout.slice_sizes)}))


def store_target(store: Store) -> Target:
    """The experts of a store."""
    files = sorted({store.location(layer, 0).file for layer in store.moe_layers})
    return Target(tuple(files), read_sizes(store.layout), f"The store {store.path}", "the experts of a store")


def store_speed(store: Store) -> float:
    """Bytes per second that a few reads of a store's experts bring, in half a second at most; OSError."""
    target = store_target(store)
    return RandomReads(target, target.sizes[-1], 2, STREAM_BYTES // 4, random.Random(0)).run()[0]


class RandomReads:
    """Threads that read until so many bytes were read, or the time is over."""

    def __init__(self, target: Target, size: int, readers: int, nbytes: int, draw: random.Random) -> None:
        # As many for each reader, so that none is left alone at the end.
        count = max(nbytes // (size * readers), 2)
        self._places = [[target.place(size, draw) for _ in range(count)] for _ in range(readers)]
        self._size = size
        self._latencies: list[float] = []
        self._bytes = 0
        self._error: OSError | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()

    def run(self) -> tuple[float, float]:
        """(bytes per second, median seconds of a read). Raises OSError."""
        buffers = [as_bytes(allocate(self._size)) for _ in self._places]
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))  # pages that are there: the first read into new ones is slow
        threads = [
            threading.Thread(target=self._read, args=(places, buffer), daemon=True)
            for places, buffer in zip(self._places, buffers, strict=True)
        ]
        start = time.perf_counter()
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # Ctrl-C: nothing may write to the buffers any more
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._error is not None:
            raise self._error
        return self._bytes / (time.perf_counter() - start), statistics.median(self._latencies)

    def _read(self, places: Sequence[tuple[Path, int]], buffer: memoryview) -> None:
        files: dict[Path, File] = {}
        end = time.perf_counter() + SAMPLE_SECONDS
        try:
            for number, (path, offset) in enumerate(places):
                before = time.perf_counter()
                if self._stop.is_set() or (number and before > end):
                    return
                if path not in files:
                    files[path] = File(path)
                done = 0
                while done < self._size:
                    got = files[path].read([buffer[done:]], offset + done)
                    if got == 0:
                        raise OSError(5, f"{path} ended while it was read")
                    done += got
                after = time.perf_counter()
                with self._lock:
                    self._latencies.append(after - before)
                    self._bytes += done
        except OSError as error:
            self._error = error
        finally:
            for file in files.values():
                file.close()
