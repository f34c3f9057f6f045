"""Reads slices from disk straight into their slots, by threads that block.

O_DIRECT bypasses the page cache, so that the budget means what it says and nothing else on the machine is pushed out.
Where a file system refuses it, reads are buffered and the pages are given back after each read.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moert.errors import StoreError

READERS = 2  # one or two saturate a disk at these sizes; more only compete with computing
MAX_IOV = 1024  # buffers that one preadv call may take (IOV_MAX on Linux)


def direct_io_works(file: Path) -> bool:
    """Whether `file` can be read with O_DIRECT."""
    reader = _File(file)
    try:
        return reader.direct
    finally:
        reader.close()


class _File:
    """One open expert file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct = False
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            try:
                self.fd = os.open(path, os.O_RDONLY | flag)
                self.direct = True
                return
            except OSError:  # tmpfs and some network file systems
                pass
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        done = os.preadv(self.fd, buffers[:MAX_IOV], offset)
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        os.close(self.fd)


@dataclass(eq=False)
class Read:
    """One read in flight: `buffers` are filled in order from `offset` of `path`.

    checksums: CRC-32 that each buffer must have, or None where it was checked before. `what`: the expert, for errors.
    """

    path: Path
    offset: int
    buffers: Sequence[memoryview]
    checksums: Sequence[int | None]
    what: str
    error: Exception | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Block until the bytes are there and checked. Raises StoreError where they could not be had."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class SliceReader:
    """Reading threads and the files that they keep open."""

    def __init__(self, threads: int = READERS) -> None:
        self._queue: queue.SimpleQueue[Read | threading.Barrier | None] = queue.SimpleQueue()
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"moert-read-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read) -> None:
        """Start a read; `read.wait()` tells when it has ended."""
        self._queue.put(read)

    def drain(self) -> None:
        """Block until everything submitted so far has ended: nothing writes to any buffer any more."""
        barrier = threading.Barrier(len(self._threads) + 1)
        for _ in self._threads:
            self._queue.put(barrier)
        barrier.wait()

    def close(self) -> None:
        """Let the threads end after what is queued, and close the files."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _work(self) -> None:
        while (read := self._queue.get()) is not None:
            if isinstance(read, threading.Barrier):
                read.wait()
                continue
            try:
                self._fill(read)
                self._check(read)
            except Exception as error:  # whatever it is, it must reach the caller, who waits
                read.error = error
            finally:
                read._done.set()

    def _file(self, path: Path) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
            return file

    def _fill(self, read: Read) -> None:
        total = sum(len(b) for b in read.buffers)
        try:
            file = self._file(read.path)
            done = 0
            while done < total:
                got = file.read(_remaining(read.buffers, done), read.offset + done)
                if got == 0:
                    raise StoreError(f"{read.path} ends before {read.what}: convert the model again.")
                done += got
        except OSError as error:
            raise StoreError(f"Reading {read.what} from {read.path} failed: {error.strerror or error}.") from error

    @staticmethod
    def _check(read: Read) -> None:
        for index, (buffer, expected) in enumerate(zip(read.buffers, read.checksums, strict=True)):
            if expected is not None and zlib.crc32(buffer) != expected:
                raise StoreError(
                    f"{read.path}: {read.what} is damaged (checksum of part {index} differs): convert the model again."
                )


def _remaining(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
        else:
            rest.append(buffer[done:])
            done = 0
    return rest
