"""Memory that control groups leave to a process, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from moert.hardware import memory

MIB = 1 << 20
MACHINE = 1 << 40


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder without any control group, on a machine with more memory than any group."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    machine = psutil.virtual_memory()._replace(total=MACHINE, available=MACHINE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return tmp_path


def write(root: Path, files: dict[str, str | int]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def v2(folder: str, limit: str | int, used: int, stat: str = "") -> dict[str, str | int]:
    top = f"sys/fs/cgroup{folder}"
    return {f"{top}/memory.max": limit, f"{top}/memory.current": used, f"{top}/memory.stat": stat}


def v1(folder: str, limit: int, used: int, stat: str = "") -> dict[str, str | int]:
    top = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{top}/memory.limit_in_bytes": limit,
        f"{top}/memory.usage_in_bytes": used,
        f"{top}/memory.stat": stat,
    }


def test_without_groups_the_machine_counts(root: Path) -> None:
    assert (memory.available_bytes(), memory.total_bytes()) == (MACHINE, MACHINE)
    write(root, {"proc/self/cgroup": "0::/", **v2("", "max", MIB)})
    assert (memory.available_bytes(), memory.total_bytes()) == (MACHINE, MACHINE)


def test_page_cache_that_can_be_reclaimed_is_available(root: Path) -> None:
    stat = f"anon {100 * MIB}\nfile {850 * MIB}\ninactive_file {844 * MIB}\nactive_file {6 * MIB}"
    write(root, {"proc/self/cgroup": "0::/", **v2("", 1000 * MIB, 950 * MIB, stat)})
    assert memory.available_bytes() == (50 + 844 + 3) * MIB
    assert memory.total_bytes() == 1000 * MIB


def test_pages_that_wait_to_be_written_are_not_free(root: Path) -> None:
    stat = f"inactive_file {500 * MIB}\nactive_file 0\nfile_dirty {80 * MIB}\nfile_writeback {20 * MIB}"
    write(root, {"proc/self/cgroup": "0::/", **v2("", 1000 * MIB, 900 * MIB, stat)})
    assert memory.available_bytes() == (100 + 400) * MIB


def test_version_1_counts_its_totals(root: Path) -> None:
    stat = f"cache 1\ninactive_file 1\ntotal_inactive_file {844 * MIB}\ntotal_active_file {10 * MIB}\ntotal_dirty {MIB}"
    write(
        root, {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n0::/", **v1("/box", 1000 * MIB, 990 * MIB, stat)}
    )
    write(root, v1("", (1 << 63) - 4096, 5000 * MIB))
    assert memory.available_bytes() == (10 + 844 + 5 - 1) * MIB
    assert memory.total_bytes() == 1000 * MIB


@pytest.mark.parametrize(("inner", "outer", "total"), [(700, 1000, 700), ("max", 1000, 1000), (3000, 1000, 1000)])
def test_of_nested_groups_each_counts(root: Path, inner: int | str, outer: int, total: int) -> None:
    own = inner if isinstance(inner, str) else inner * MIB
    write(root, {"proc/self/cgroup": "0::/user.slice/a:b.scope", **v2("/user.slice", outer * MIB, 600 * MIB)})
    write(root, v2("/user.slice/a:b.scope", own, 500 * MIB))
    assert memory.total_bytes() == total * MIB
    assert memory.available_bytes() == min(total - 500, outer - 600) * MIB


def test_in_a_container_the_path_may_be_the_hosts(root: Path) -> None:
    write(root, {"proc/self/cgroup": "7:memory:/docker/0123abcd", **v1("", 512 * MIB, 12 * MIB)})
    assert memory.available_bytes() == 500 * MIB
    write(root, {"proc/self/cgroup": "7:memory:/../../docker"})
    assert memory.available_bytes() == 500 * MIB


@pytest.mark.parametrize("stat", ["inactive_file many", "inactive_file", "inactive_file -5"])
def test_a_strange_stat_counts_nothing(root: Path, stat: str) -> None:
    write(root, {"proc/self/cgroup": "nonsense", **v2("", 1000 * MIB, 900 * MIB, stat)})
    assert memory.available_bytes() == 100 * MIB


def test_a_full_group_has_nothing_left(root: Path) -> None:
    write(root, v2("", 100 * MIB, 120 * MIB))
    assert memory.available_bytes() <= 0
