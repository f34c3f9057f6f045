"""Large blocks of host memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


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
