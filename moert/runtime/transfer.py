"""Reads slices from disk straight into their slots, by threads that block.

O_DIRECT bypasses the page cache, so that the budget means what it says and nothing else on the machine is pushed out.
Where a file system refuses it, reads are buffered and the pages are given back after each read.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from moert.errors import StoreError
from moert.store.fileio import as_bytes

_native: ModuleType | None
try:
    from moert.runtime import _reader as _native  # type: ignore[attr-defined, no-redef]
except ImportError:  # not built: Python's threads read, slowly
    _native = None

READERS = 2  # one or two saturate a disk at these sizes; more only compete with computing
CHUNK_BYTES = 1 << 20  # what a demand may have to wait for; at 256 KiB these disks are no slower, but Python is
_SHORT, _DAMAGED = -1, -2  # outcomes of the compiled module's reads
MAX_IOV = 1024  # buffers that one preadv call may take (IOV_MAX on Linux)


def direct_io_works(file: Path) -> bool:
    """Tell whether `file` can be read with O_DIRECT."""
    reader = File(file)
    try:
        return reader.direct
    finally:
        reader.close()


class File:
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
    """One read: `parts` are filled in order from `offset` of `path`.

    parts: where each begins in the reader's memory, its bytes, and the CRC-32 that it must have, or -1 where it was
    checked before. what: the expert, for errors. begun, ended: when the disk was asked for the first of its bytes, and
    when all were there and checked.
    """

    path: Path
    offset: int
    parts: Sequence[tuple[int, int, int]]
    what: str
    error: Exception | None = None
    begun: float = 0.0
    ended: float = 0.0
    _left: int = 0  # chunks that are not read yet
    _started: bool = False
    _done: threading.Event | None = None  # where Python's threads read
    _job: Any = None  # where the compiled module reads
    _reader: Any = None

    @property
    def nbytes(self) -> int:
        return sum([size for _, size, _ in self.parts])

    @property
    def done(self) -> bool:
        if self._done is not None:
            return self._done.is_set()
        return self._job is not None and bool(self._reader.done(self._job))

    def end(self) -> None:
        """Nothing more will come of it."""
        if self._done is not None:
            self._done.set()

    def wait(self) -> None:
        """Block until the bytes are there and checked. Raises StoreError where they could not be had."""
        if self._done is not None:
            self._done.wait()
        elif self._job is not None:
            self._reader.wait(self._job)
            self.begun, self.ended = self._job.begun, self._job.ended
            self.error = self._failure(self._job.outcome, self._job.damaged)
        if self.error is not None:
            raise self.error

    def _failure(self, outcome: int, part: int) -> StoreError | None:
        """The error behind a number: an errno, or what the compiled module calls kShort and kDamaged."""
        if outcome > 0:
            return StoreError(f"Reading {self.what} from {self.path} failed: {os.strerror(outcome)}.")
        if outcome == _SHORT:
            return StoreError(f"{self.path} ends before {self.what}: convert the model again.")
        if outcome == _DAMAGED:
            return StoreError(
                f"{self.path}: {self.what} is damaged (checksum of part {part} differs): convert the model again."
            )
        return None


class Reader(Protocol):
    """Reads in the background. Reads are cut into chunks; what somebody waits for goes first, so that it waits for one
    chunk of each thread at most."""

    def submit(self, read: Read, ahead: bool = False) -> None:
        """Start a read; `read.wait()` tells when it has ended. ahead: nobody waits for it, others go first."""

    def promote(self, read: Read) -> None:
        """Somebody waits for it now."""

    def cancel(self, read: Read) -> bool:
        """Drop a read of which nothing was asked from the disk yet; False where it is too late for that."""

    def drain(self) -> None:
        """Drop what has not begun and block until the rest has ended: nothing writes to any buffer any more."""

    def close(self) -> None:
        """Let the threads end after what is queued, and close the files."""


def native_reader() -> ModuleType | None:
    """The compiled reader, whatever kernel computes; None where it was not built."""
    return _native


def make_reader(memory: Tensor, native: bool | None = None) -> Reader:
    """Start the compiled module's threads, which need no interpreter, or Python's where it was not built.

    memory: uint8, what reads fill. native: one of the two, whatever there is; RuntimeError where it was not built.
    """
    if native is None:
        native = _native is not None
    return NativeReader(memory) if native else SliceReader(memory)


class _Files:
    """Files that stay open."""

    def __init__(self) -> None:
        self._files: dict[Path, File] = {}

    def __getitem__(self, path: Path) -> File:
        """Raises OSError where it cannot be opened."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = File(path)
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class NativeReader:
    """Threads of the compiled module, which keep the memory alive that they fill."""

    def __init__(self, memory: Tensor, threads: int = READERS) -> None:
        if _native is None:
            raise RuntimeError("the compiled module moert.runtime._reader was not built")
        self._files = _Files()
        self._native = _native.Reader(memory.data_ptr(), threads, CHUNK_BYTES, memory)

    def __del__(self) -> None:
        if hasattr(self, "_native"):
            self._native.drain()
            self.close()

    def submit(self, read: Read, ahead: bool = False) -> None:
        try:
            file = self._files[read.path]
        except OSError as error:
            raise StoreError(f"Reading {read.what} from {read.path} failed: {error.strerror}.") from error
        read._reader = self._native
        read._job = self._native.submit(file.fd, not file.direct, read.offset, read.parts, ahead)

    def promote(self, read: Read) -> None:
        self._native.promote(read._job)

    def cancel(self, read: Read) -> bool:
        return read._job is None or bool(self._native.cancel(read._job))

    def drain(self) -> None:
        self._native.drain()

    def close(self) -> None:
        self._native.close()
        self._files.close()


_Chunk = tuple[Read, int, int]  # of which read, from and to which of its bytes


class SliceReader:
    """Python's threads, where the compiled module was not built."""

    def __init__(self, memory: Tensor, threads: int = READERS) -> None:
        self._memory = as_bytes(memory)
        self._demanded: deque[_Chunk] = deque()
        self._ahead: deque[_Chunk] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._busy = 0  # threads that read
        self._closed = False
        self._files = _Files()
        self._threads = [
            threading.Thread(target=self._work, name=f"moert-read-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read, ahead: bool = False) -> None:
        total, read._done = read.nbytes, threading.Event()
        starts = range(0, total, CHUNK_BYTES)
        read._left = len(starts)
        chunks = [(read, at, min(at + CHUNK_BYTES, total)) for at in starts]
        with self._changed:
            (self._ahead if ahead else self._demanded).extend(chunks)
            self._changed.notify(len(chunks))

    def promote(self, read: Read) -> None:
        with self._changed:
            chunks = [chunk for chunk in self._ahead if chunk[0] is read]
            for chunk in chunks:
                self._ahead.remove(chunk)
            self._demanded.extend(chunks)

    def cancel(self, read: Read) -> bool:
        with self._changed:
            if read._started:
                return False
            for waiting in (self._ahead, self._demanded):
                for chunk in [chunk for chunk in waiting if chunk[0] is read]:
                    waiting.remove(chunk)
            read.end()
            return True

    def drain(self) -> None:
        with self._changed:
            for chunk in [*self._demanded, *self._ahead]:
                if not chunk[0]._started:
                    chunk[0].end()
            self._demanded = deque(chunk for chunk in self._demanded if chunk[0]._started)
            self._ahead = deque(chunk for chunk in self._ahead if chunk[0]._started)
            self._changed.wait_for(lambda: not (self._busy or self._demanded or self._ahead))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._files.close()

    def _work(self) -> None:
        while (chunk := self._next()) is not None:
            read, first, last = chunk
            error: Exception | None = None
            try:
                if read.error is None:  # the rest of what has failed is of no use
                    self._fill(read, first, last)
            except Exception as failure:  # whatever it is, it must reach the caller, who waits
                error = failure
            with self._changed:
                read.error = read.error or error
                read._left -= 1
                whole = read._left == 0
            if whole:
                self._finish(read)
            with self._changed:
                self._busy -= 1
                if self._busy == 0:
                    self._changed.notify_all()  # drain may wait for it

    def _next(self) -> _Chunk | None:
        with self._changed:
            self._changed.wait_for(lambda: self._demanded or self._ahead or self._closed)
            waiting = self._demanded or self._ahead
            if not waiting:
                return None
            chunk = waiting.popleft()
            self._busy += 1
            if not chunk[0]._started:
                chunk[0]._started = True
                chunk[0].begun = time.perf_counter()
            return chunk

    def _finish(self, read: Read) -> None:
        try:
            if read.error is None:
                self._check(read)
        except Exception as failure:
            read.error = failure
        read.ended = time.perf_counter()
        read.end()

    def _fill(self, read: Read, first: int, last: int) -> None:
        try:
            with self._changed:
                file = self._files[read.path]
            while first < last:
                got = file.read(self._pieces(read, first, last), read.offset + first)
                if got == 0:
                    read.error = read._failure(_SHORT, -1)
                    return
                first += got
        except OSError as error:
            raise StoreError(f"Reading {read.what} from {read.path} failed: {error.strerror or error}.") from error

    def _check(self, read: Read) -> None:
        for index, (at, size, expected) in enumerate(read.parts):
            if expected >= 0 and zlib.crc32(self._memory[at : at + size]) != expected:
                read.error = read._failure(_DAMAGED, index)
                return

    def _pieces(self, read: Read, first: int, last: int) -> list[memoryview]:
        """The memory of bytes first .. last of a read."""
        pieces, begin = [], 0
        for at, size, _ in read.parts:
            if begin < last and begin + size > first:
                pieces.append(self._memory[at + max(first - begin, 0) : at + min(last - begin, size)])
            begin += size
        return pieces
