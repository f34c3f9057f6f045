"""Large blocks of host memory."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, in this process from now on.

    It would give large blocks back at once, and a prefill would get all its temporary tensors as new pages, which the
    system zeroes one by one: a fifth of its time. Does nothing where the library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def allocate(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros that begin on a page; a page costs memory once it is written.

    On huge pages where the system has them: fewer faults, and streams of reads that do not stop every 4 KiB. Private:
    a shared mapping, which Python makes by default, gets huge pages on hardly any system.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    block = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)[:nbytes]
