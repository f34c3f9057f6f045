"""Disks that are or become full while converting: one sentence, a folder to resume from, the source as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moert.convert.convert import convert
from moert.errors import StoreError

from .checkpoints import folder_bytes, make_checkpoint, refusal


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", shards=2)


def free_space(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """The check before writing sees `nbytes` of free space."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes))


def test_too_little_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_space(monkeypatch, 1)
    refusal(lambda: convert(source, tmp_path / "out"), StoreError, "needs 0.1 MiB", "only 0.0 MiB are free")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def optimistic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plenty of space at the start, as when another program fills the disk meanwhile."""
    free_space(monkeypatch, 1 << 50)


FULL = ("is full", "needs", "--resume")


@pytest.mark.usefixtures("optimistic")
def test_files_that_may_not_grow_stop_the_conversion_and_it_resumes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "reference")
    before = folder_bytes(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, hard))
    try:
        refusal(lambda: convert(source, tmp_path / "out"), StoreError, *FULL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder_bytes(source) == before
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    convert(source, tmp_path / "out", resume=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "reference")


@pytest.mark.usefixtures("optimistic")
def test_full_disk_in_the_middle(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, 0

    def failing(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    refusal(lambda: convert(source, tmp_path / "out"), StoreError, *FULL)
    monkeypatch.setattr(os, "fsync", fsync)
    convert(source, tmp_path / "out", resume=True).verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds half of the store."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_small_disk_is_refused_before_writing(source: Path, small_disk: Path) -> None:
    refusal(lambda: convert(source, small_disk / "out"), StoreError, "needs", "are free")
    assert not list(small_disk.iterdir())


@pytest.mark.usefixtures("optimistic")
def test_small_disk_fills_and_a_larger_one_resumes(source: Path, small_disk: Path) -> None:
    before = folder_bytes(source)
    refusal(lambda: convert(source, small_disk / "out"), StoreError, *FULL)
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    convert(source, small_disk / "out", resume=True).verify()
    assert folder_bytes(source) == before


def test_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal(lambda: convert(source, tmp_path / "file" / "out"), StoreError, "Cannot convert to")
