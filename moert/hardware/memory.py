"""Memory of this machine: what there is, what is left, and what the interpreter and its libraries take."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

_MIB = 1 << 20
# What is measured of interpreter and libraries differs by a few pages from run to run: rounded up, it does not.
_LIBRARY_STEP = 32 * _MIB
# Grown later by thread stacks, the allocator's slack and code pages not touched yet.
_LIBRARY_GROWTH = 48 * _MIB
# Grown by a device's first kernels: their compiler (Triton 3.7: 56 MiB), and locked memory that copies go through.
_DEVICE_GROWTH = 96 * _MIB


def library_bytes(compiles: bool = False) -> int:
    """Resident memory of interpreter and libraries now, with what they will still grow by, rounded up.

    compiles: whether there is a device whose kernels are compiled.
    """
    growth = _LIBRARY_GROWTH + (_DEVICE_GROWTH if compiles else 0)
    return -(-(psutil.Process().memory_info().rss + growth) // _LIBRARY_STEP) * _LIBRARY_STEP


def available_bytes() -> int:
    """Memory that this process can still get: the machine's, or its control group's where that is less."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _group_limits())])


def total_bytes() -> int:
    """Memory that programs may use in all: the machine's, or its control group's where that is less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _group_limits())])


def _group_limits() -> Iterator[tuple[int, int]]:
    """Of the control groups that limit memory: the limit and what is in use, in bytes."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_file) as limit, open(used_file) as used:
                yield int(limit.read()), int(used.read())
        except (OSError, ValueError):  # no such file, or "max"
            continue
