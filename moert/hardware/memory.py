"""Memory of this machine: what there is, what is left, and what the interpreter and its libraries take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_MIB = 1 << 20
_ROOT = Path("/")
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
    """Yield limit and bytes in use of each control group that limits this process: its own one and all above it.

    What is in use leaves out page cache that the kernel would give up: file pages that were not used lately, and half
    of those that were. The other half may be code and data of running programs, so that taking it would make them read
    it again and again; pages that wait to be written are not free until the disk has them.
    """
    for folder, limit, usage, prefix in _memory_groups():
        try:
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        yield most, max(used - _reclaimable(folder / "memory.stat", prefix), 0)


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield folders of control groups with the names of their files, and what `memory.stat` puts before totals.

    In a container the path of the process may be the host's, of which only a part, or nothing, can be seen here: then
    the folder where the controllers are mounted is the container's own group.
    """
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {"": "/", "memory": "/"}
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(paths.keys() & set(controllers.split(",")), path)
    mount = _ROOT / "sys/fs/cgroup"
    versions = (
        (mount, paths[""], "memory.max", "memory.current", ""),
        (mount / "memory", paths["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for top, path, limit, usage, prefix in versions:
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:count]), limit, usage, prefix


def _reclaimable(stat: Path, prefix: str) -> int:
    """Bytes of page cache in a control group that the kernel gives up for programs; 0 where it does not say."""
    try:
        words = [line.split() for line in stat.read_text().splitlines()]
        values = {name: int(value) for name, value in words}
    except (OSError, ValueError):
        return 0
    written = ("dirty", "writeback") if prefix else ("file_dirty", "file_writeback")
    inactive, active, *waiting = (values.get(prefix + name, 0) for name in ("inactive_file", "active_file", *written))
    return max(inactive + active // 2 - sum(waiting), 0)
