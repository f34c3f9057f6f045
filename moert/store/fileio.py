"""Positional reads into memory that the caller owns, and writes that survive a power cut.

Nothing here maps files: mapped pages would count as resident memory and defeat the memory budget.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_READ_BYTES = 1 << 30  # the kernel returns at most 2 GiB per call


@contextmanager
def opened(path: Path, start: int = 0, length: int = 0) -> Iterator[int]:
    """A file descriptor for reading; what was read through it is dropped from the page cache afterwards.

    start, length: what will be read, where it is little of a large file: to drop all of that takes 20 ms.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield fd
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of the file; returns the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done : done + _READ_BYTES]], offset + done)
        if got == 0:
            break
        done += got
    return done


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, shared, as flat bytes."""
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data


def readable(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"


def sync_folder(path: Path) -> None:
    """Make names created or renamed in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A binary file that appears at `path`, whole and durable, when the block ends; nothing stays after an error."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_bytes(value: Any) -> bytes:
    """`value` as JSON; the same value always gives the same bytes."""
    return json.dumps(value, indent=None, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))
