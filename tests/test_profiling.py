"""Measuring a machine, with sizes so small that what comes out says nothing. No test asserts a time."""

import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert.errors import ProfileError
from moert.hub.resolve import shipped_model
from moert.measure import bench_kernels, compute, disk, gpu, overheads
from moert.measure.figure import measured
from moert.models.stored_model import StoredModel
from moert.quant import dispatch
from moert.quant.format import ExpertLayout
from moert.runtime import transfer
from moert.runtime.disk_speed import store_target

from .machine import FakeGpu, shrink, without_direct

SMALL = ExpertLayout(64, 32, 32, (2, 3, 4))
SIZES = disk.read_sizes(SMALL)


def silent(text):
    pass


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_of_repetitions_the_median_counts(samples):
    found = measured(samples)
    assert found.value == statistics.median(samples)
    assert found.spread == pytest.approx((max(samples) - min(samples)) / found.value)


def test_repetitions_of_nothing_have_no_spread():
    assert measured([0.0, 0.0]) == (0.0, 0.0)


@given(st.integers(1, 1 << 20), st.sampled_from(SIZES), st.integers(0, 99))
def test_places_are_aligned_and_inside(pages, size, seed):
    import random

    length = max(pages * 4096 + 17, size)
    path = SimpleNamespace(stat=lambda: SimpleNamespace(st_size=length))
    _, offset = disk.Target((path,), SIZES, "", "").place(size, random.Random(seed))
    assert offset % 4096 == 0
    assert 0 <= offset <= length - size


def test_the_disk_is_read_in_all_sizes_by_all_numbers_of_readers(small, tmp_path):
    with disk.written_target(tmp_path, SMALL, silent) as target:
        assert target.files[0].stat().st_size == 1 << 20
        found = disk.measure_disk(target, silent)
    assert [(row.size_bytes, row.readers) for row in found.rows] == [(s, n) for s in SIZES for n in disk.READERS]
    assert all(row.bytes_per_s > 0 and row.latency_s > 0 for row in found.rows)
    assert found.bytes_per_s.value > 0
    assert list(tmp_path.iterdir()) == []


def test_of_a_store_the_experts_are_read(small):
    store = StoredModel.open(shipped_model())
    target = store_target(store)
    assert {path.name for path in target.files} == {f"experts-0000{i}.safetensors" for i in range(6)}
    assert set(target.sizes) == {*store.layout.slice_sizes, sum(store.layout.slice_sizes)}
    assert disk.measure_disk(target, silent).direct == transfer.direct_io_works(target.files[0])


def test_a_disk_without_direct_reads_is_measured_buffered(small, tmp_path, monkeypatch):
    without_direct(monkeypatch)
    with disk.written_target(tmp_path, SMALL, silent) as target:
        assert not disk.measure_disk(target, silent).direct


def test_a_disk_that_cannot_be_measured_is_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ProfileError, match=r"cannot be written to .*/file: .*; name another folder with --disk"),
        disk.written_target(tmp_path / "file", SMALL, silent),
    ):
        pass
    monkeypatch.setattr(disk.psutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with (
        pytest.raises(ProfileError, match=r"only 1\.0 MiB are free, and it should be twice as much"),
        disk.written_target(tmp_path, SMALL, silent),
    ):
        pass
    gone = disk.Target((tmp_path / "gone",), SIZES, "The store x", "")
    with pytest.raises(ProfileError, match=r"The store x cannot be read: No such file"):
        disk.measure_disk(gone, silent)
    monkeypatch.setattr(transfer.File, "read", lambda self, buffers, offset: 0)
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    with pytest.raises(ProfileError, match="ended while it was read"):
        disk.measure_disk(disk.Target((tmp_path / "file",), SIZES, "It", ""), silent)


@pytest.mark.parametrize("when", ["writing", "latency", "4 at a time", "runtime"])
def test_whenever_it_is_interrupted_the_file_is_gone(small, tmp_path, when):
    def interrupt(text):
        if when in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), disk.written_target(tmp_path, SMALL, interrupt) as target:
        disk.measure_disk(target, interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_kernels_are_measured_at_every_width(small, kernel):
    active = dispatch.kernel_name()
    try:
        if kernel:
            dispatch.set_kernel(kernel)
        found = compute.measure_compute([ExpertLayout(64, 32, 32, (4,)), *compute.default_layouts()], silent)
    finally:
        dispatch.set_kernel(active)
    assert found.expert_s_per_byte.keys() == found.prefill_macs_per_s.keys() == {2, 3, 4, 6, 8}
    every = [*found.expert_s_per_byte.values(), *found.prefill_macs_per_s.values(), found.dense_s_per_byte.value]
    assert min(*every, found.dense_prefill_macs_per_s.value, found.attention_macs_per_s.value) > 0


def test_bandwidths_are_those_of_one_loop():
    found = bench_kernels.memory_bandwidths(1, 1 << 22)
    assert len(found) == 9
    assert min(found) > 0


@given(
    st.lists(st.integers(1, 8), max_size=30),
    st.floats(1e-5, 1e-2),
    st.floats(1e-5, 1e-2),
    st.integers(0, 3),
)
def test_planning_and_reads_are_told_apart(reads, once, each, wrong):
    reads = np.array([1, 2, 3, 4, 5, 6, 7, 8] * 4 + reads, dtype=float)
    seconds = once + each * reads
    seconds[12 : 12 + wrong] += 50.0  # something else ran
    found = overheads.fit(reads, seconds)
    assert found == pytest.approx((once, each), rel=1e-4)


def test_overheads_are_never_below_zero():
    reads = np.array([1.0, 2, 3, 4, 5, 6])
    assert overheads.fit(reads, 1e-3 - 1e-5 * reads) == (pytest.approx(np.mean(1e-3 - 1e-5 * reads), rel=0.1), 0.0)
    once, each = overheads.fit(reads, 1e-4 * reads - 1e-5)
    assert once == 0
    assert each > 0
    assert overheads.fit(np.ones(6), np.full(6, 0.5)) == pytest.approx((0.5, 0.0))
    assert overheads.fit(np.ones(6), np.full(6, -0.5)) == (0.0, 0.0)


@pytest.mark.parametrize("large", [False, True])
def test_overheads_of_the_model_that_ships(small, monkeypatch, large):
    store = StoredModel.open(shipped_model())
    monkeypatch.setattr(overheads, "LARGE_EXPERT", 1 if large else 1 << 20)
    said = []
    found = overheads.measure_overheads(store, store, 1, said.append)
    assert min(found.token_s.value, found.miss_s.value, found.load_s.value) >= 0
    assert found.layer_s.value > 0
    assert found.model == "a model of 6 layers with experts of 60.0 KiB"
    assert any("some experts in memory" in text for text in said) == large


def test_where_a_large_model_does_not_tell_the_model_that_ships_does(small, monkeypatch):
    store, wanted = StoredModel.open(shipped_model()), []
    real = overheads._overheads

    def not_at_first(resident, missing, store):
        wanted.append(len(missing))
        return None if len(wanted) == 1 else real(resident, missing, store)

    monkeypatch.setattr(overheads, "LARGE_EXPERT", 1)
    monkeypatch.setattr(overheads, "SHARES", (0.5, 0.4))
    monkeypatch.setattr(overheads, "_overheads", not_at_first)
    overheads.measure_overheads(store, store, 1, silent)
    assert wanted == [1, 2]
    monkeypatch.setattr(overheads, "_overheads", lambda *arguments: None)
    with pytest.raises(ProfileError, match="did not give what it takes to tell costs apart: try again"):
        overheads.measure_overheads(store, store, 1, silent)


@pytest.mark.parametrize("integrated", [False, True])
def test_a_gpu(monkeypatch, integrated):
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    found = gpu.measure_gpu(FakeGpu(clock, integrated), 5 << 30, silent)
    assert found.memory_bytes == (5 if integrated else 8) << 30
    assert found.memory_bytes_per_s == (2 * gpu.BYTES / 0.5, 0.0)
    assert found.host_to_device_bytes_per_s == (gpu.BYTES / 2, 0.0)
    assert found.expert_s_per_byte == {16: 0.25 / gpu.BYTES}


def test_the_gpu_that_torch_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.find_gpu() is None
    properties = SimpleNamespace(name="Orin", total_memory=1 << 20, is_integrated=1)
    waited = []
    cuda = SimpleNamespace(get_device_properties=lambda index: properties, synchronize=lambda: waited.append(1))

    def ones(*shape, device=None, **options):
        made = torch.ones(*shape, **options)
        made.pin_memory = lambda: made
        return made

    fake = SimpleNamespace(cuda=cuda, ones=ones, empty_like=torch.empty_like, mv=torch.mv, float16=torch.float16)
    found = gpu.CudaGpu(fake)
    assert (found.name, found.total_bytes, found.integrated) == ("Orin", 1 << 20, True)
    monkeypatch.setattr(gpu, "BYTES", 1 << 20)
    found = gpu.CudaGpu(fake)
    for call in (found.copy_within, found.copy_from_host, found.multiply):
        call()
    assert len(waited) == 3

    def broken(index):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert gpu.find_gpu() is None
