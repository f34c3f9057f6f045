"""The reading threads, Python's and the compiled ones: the same promises, kept under real faults."""

import ctypes
import os
import threading
import time
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import StoreError
from moert.runtime import transfer
from moert.runtime.arena import Arena
from moert.runtime.transfer import NativeReader, Read, SliceReader

PAGE, CHUNK, PAGES = 4096, 4 * 4096, 64


def make(kind, memory, threads):
    if kind == "python":
        return SliceReader(memory, threads)
    return NativeReader(memory, threads)


@pytest.fixture(params=["python", *(["compiled"] if transfer.native_reader() else [])])
def make_reader(request, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)
    readers = []

    def build(threads=2):
        arena = Arena((PAGES,), (PAGE,))
        readers.append(make(request.param, arena.memory, threads))
        return readers[-1], arena.memory

    yield build
    for reader in readers:
        reader.close()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(PAGES * PAGE))
    return path


@pytest.mark.skipif(transfer.native_reader() is None, reason="the compiled reader was not built")
@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 15))
def test_checksums_are_those_of_zlib(data, skip):
    buffer = ctypes.create_string_buffer(data, len(data) + 1)
    skip = min(skip, len(data))
    assert transfer.native_reader().crc32(ctypes.addressof(buffer) + skip, len(data) - skip) == zlib.crc32(data[skip:])


def test_parts_go_where_they_belong(make_reader, file):
    reader, memory = make_reader()
    data = file.read_bytes()
    parts = [(20 * PAGE, 7 * PAGE), (3 * PAGE, PAGE), (40 * PAGE, 9 * PAGE)]
    begin, listed = 5 * PAGE, []
    for at, size in parts:
        listed.append((at, size, zlib.crc32(data[begin : begin + size])))
        begin += size
    read = Read(file, 5 * PAGE, listed, "x")
    reader.submit(read)
    read.wait()
    assert read.done
    assert 0 < read.begun <= read.ended <= time.perf_counter()
    begin = 5 * PAGE
    for at, size in parts:
        assert memory[at : at + size].numpy().tobytes() == data[begin : begin + size]
        begin += size


@pytest.mark.parametrize("ahead", [False, True])
def test_faults_reach_who_waits(make_reader, file, tmp_path, ahead):
    reader, _ = make_reader()

    def outcome(path, offset, checksum=-1):
        read = Read(path, offset, [(0, 2 * PAGE, checksum)], "expert 3 of layer 1")
        try:
            reader.submit(read, ahead)
            read.wait()
        except StoreError as error:
            return str(error)
        return "no error"

    assert "ends before expert 3 of layer 1" in outcome(file, (PAGES - 1) * PAGE)
    assert "damaged (checksum of part 0 differs)" in outcome(file, 0, checksum=12345)
    assert "No such file" in outcome(tmp_path / "absent", 0)
    assert "Is a directory" in outcome(tmp_path, 0)
    good = Read(file, 0, [(0, PAGE, -1)], "x")
    reader.submit(good, ahead)
    good.wait()


def test_a_demand_goes_before_prefetches(make_reader, file):
    reader, _ = make_reader(threads=1)
    prefetches = [Read(file, 0, [(0, 8 * PAGE, -1)], "p") for _ in range(200)]
    for read in prefetches:
        reader.submit(read, ahead=True)
    demand = Read(file, 0, [(32 * PAGE, PAGE, -1)], "d")
    reader.submit(demand)
    submitted = time.perf_counter()
    demand.wait()
    for read in prefetches:
        read.wait()
    assert not [read for read in prefetches if submitted < read.begun < demand.begun], "no prefetch overtakes it"


def test_a_prefetch_can_be_promoted_and_dropped(make_reader, file):
    reader, memory = make_reader(threads=1)
    memory.zero_()
    first, *others = [Read(file, i * PAGE, [(i * PAGE, PAGE, -1)], str(i)) for i in range(PAGES)]
    for read in (first, *others):
        reader.submit(read, ahead=True)
    reader.promote(others[-1])
    dropped = [read for read in others[:-1] if reader.cancel(read)]
    others[-1].wait()
    assert all(read.done for read in dropped)
    reader.drain()
    data = file.read_bytes()
    for i, read in enumerate((first, *others)):
        expected = bytes(PAGE) if read in dropped else data[i * PAGE : (i + 1) * PAGE]
        found = memory[i * PAGE : (i + 1) * PAGE].numpy().tobytes()
        assert found == expected, "what was dropped is never written, all else is"


def test_drain_leaves_nothing_that_writes(make_reader, file):
    reader, memory = make_reader()
    for _ in range(20):
        for i in range(40):
            reader.submit(Read(file, 0, [(0, 16 * PAGE, -1)], "x"), ahead=i % 2 == 0)
        reader.drain()
        memory[:] = 7
        time.sleep(0.001)
        assert bool((memory == 7).all())


def test_closing_ends_the_threads(make_reader, file):
    before = threading.active_count()
    reader, _ = make_reader()
    reads = [Read(file, 0, [(0, 16 * PAGE, -1)], "x") for _ in range(10)]
    for read in reads:
        reader.submit(read)
    reader.close()
    assert all(read.done for read in reads)
    assert threading.active_count() == before


def test_many_reads_at_once_bring_the_right_bytes(make_reader, file):
    reader, memory = make_reader()
    data = file.read_bytes()
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        order = torch.randperm(PAGES, generator=g).tolist()
        reads = [Read(file, page * PAGE, [(at * PAGE, PAGE, -1)], "x") for at, page in enumerate(order)]
        for i, read in enumerate(reads):
            reader.submit(read, ahead=i % 3 == 0)
        for read in reads:
            read.wait()
        assert memory.numpy().tobytes() == b"".join(data[p * PAGE : (p + 1) * PAGE] for p in order)
