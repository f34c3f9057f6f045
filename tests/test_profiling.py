"""Measuring a machine, with sizes so small that what comes out says nothing. No test asserts a time."""

import json
import os
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moert import bench_kernels
from moert.devices import own_file, this_machine
from moert.errors import ProfileError
from moert.profiling import compute, disk, gpu, measure, overheads
from moert.profiling.figure import Measured, measured
from moert.quant import dispatch
from moert.quant.format import ExpertLayout
from moert.runtime import transfer
from moert.scheduler.profile import REQUIRED, parse_profile, read_profile
from moert.source import shipped_model
from moert.store.reader import Store

from .program import Program

SMALL = ExpertLayout(64, 32, 32, (2, 3, 4))
SIZES = disk.read_sizes(SMALL)


def silent(text):
    pass


@pytest.fixture
def small(monkeypatch):
    """Everything as small as it can be."""
    for module, values in (
        (disk, {"FILE_BYTES": 1 << 20, "SAMPLE_BYTES": 1 << 16, "STREAM_BYTES": 1 << 16, "LATENCY_READS": 4}),
        (compute, {"HIDDEN": 64, "INNER": 32, "DENSE_SHAPE": (64, 64), "BUFFER_BYTES": 1 << 18, "SAMPLE_SECONDS": 0.0}),
        (compute, {"TOKENS": 16, "DEPTH": 16, "HEADS": 2, "KEY_HEADS": 1, "HEAD_DIM": 16, "REPETITIONS": 2}),
        (overheads, {"TOKENS": 6, "SHARES": (0.5,), "SWEEP_BYTES": 4096, "LARGE_TOKENS": 24, "LARGE_READS": 0}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    # What such small kernels take is impossible: beside these no figure is.
    figures = compute.ComputeFigures(
        {4: 1e-10}, 0.1, Measured(1e-10, 0.1), {4: 1e11}, 0.1, Measured(1e11, 0.1), Measured(1e10, 0.1)
    )
    monkeypatch.setattr(measure, "measure_compute", lambda layouts, progress: figures)
    monkeypatch.setattr(measure, "memory_bandwidths", lambda threads: [1.1e10, 1e10, 0.9e10])


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
    store = Store.open(shipped_model())
    target = disk.store_target(store)
    assert {path.name for path in target.files} == {f"experts-0000{i}.safetensors" for i in range(6)}
    assert set(target.sizes) == {*store.layout.slice_sizes, sum(store.layout.slice_sizes)}
    assert disk.measure_disk(target, silent).direct == transfer.direct_io_works(target.files[0])


def without_direct(monkeypatch):
    """A file system that refuses O_DIRECT."""
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(transfer.os, "open", refuse)


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
    store = Store.open(shipped_model())
    monkeypatch.setattr(overheads, "LARGE_EXPERT", 1 if large else 1 << 20)
    said = []
    found = overheads.measure_overheads(store, store, 1, said.append)
    assert min(found.token_s.value, found.miss_s.value, found.load_s.value) >= 0
    assert found.layer_s.value > 0
    assert found.model == "a model of 6 layers with experts of 60.0 KiB"
    assert any("some experts in memory" in text for text in said) == large


def test_where_a_large_model_does_not_tell_the_model_that_ships_does(small, monkeypatch):
    store, wanted = Store.open(shipped_model()), []
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


class FakeGpu:
    name = "Fake"
    total_bytes = 8 << 30

    def __init__(self, clock, integrated):
        self.clock, self.integrated = clock, integrated

    def copy_within(self):
        self.clock[0] += 0.5

    def copy_from_host(self):
        self.clock[0] += 2

    def multiply(self):
        self.clock[0] += 0.25


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


@pytest.fixture
def moert(small, capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


def test_what_is_measured_is_what_moert_uses(moert):
    result = moert("profile", "--name", "mine", "-t", "1")
    assert result.code == 0, result.err
    assert f"written to {own_file()}: moert uses it from now on" in result.err
    content = json.loads(own_file().read_text())
    assert content["name"] == "mine"
    assert content["figures"].keys() >= {*REQUIRED, "disk_reads"}
    assert all(figure["kind"] != "measured" or "spread" in figure for figure in content["figures"].values())
    profile, line = this_machine()
    assert profile == parse_profile(content)
    assert "measured on" in line
    assert profile.memory_bytes_per_s == 1e10
    assert content["figures"]["memory_bytes_per_s"]["spread"] == 0.2
    assert result.out.startswith("| figure | value | kind | spread |")
    assert "| memory_bytes_per_s | 10.00 GB/s | measured | 20.0% |" in result.out
    assert "| expert_s_per_byte 4 bits | 10.00 GB/s | measured | 10.0% |" in result.out
    assert [path.name for path in own_file().parent.iterdir()] == ["device.json"]


def test_a_profile_can_be_printed_or_go_elsewhere(moert, tmp_path):
    result = moert("profile", "-m", str(shipped_model()), "--out", "-", "-q", "-t", "1")
    assert result.code == 0, result.err
    assert result.err == ""
    printed = json.loads(result.out)
    assert parse_profile(printed).name == "this-machine"
    assert "experts of a store" in printed["figures"]["disk_bytes_per_s"]["source"]
    assert not own_file().exists()
    other = tmp_path / "other.json"
    result = moert("profile", "--disk", str(tmp_path), "--out", str(other), "--json", "-t", "1")
    assert result.code == 0, result.err
    assert other.read_text() == result.out
    assert f"use it with --device {other}" in result.err
    read_profile(other)
    assert not own_file().exists()


def test_a_gpu_that_is_there_is_in_the_profile(moert, monkeypatch):
    fake = FakeGpu([0.0], integrated=False)
    figures = gpu.GpuFigures("Fake", 1 << 33, Measured(1e11, 0), Measured(1e10, 0), False, {16: 1e-11}, 0.0)
    monkeypatch.setattr(measure, "find_gpu", lambda: fake)
    monkeypatch.setattr(measure, "measure_gpu", lambda found, host, progress: figures)
    profile = parse_profile(json.loads(moert("profile", "--out", "-", "-t", "1").out))
    assert profile.gpu_memory_bytes == 1 << 33
    assert profile.gpu_expert_s_per_byte == {16: 1e-11}
    assert profile.description.endswith(", Fake")


def test_a_disk_without_direct_reads_is_said(moert, monkeypatch):
    without_direct(monkeypatch)
    result = moert("profile", "--out", "-", "-t", "1")
    assert "does not take O_DIRECT: reads are buffered" in result.err
    content = json.loads(result.out)
    assert parse_profile(content).disk_direct is False
    assert "buffered" in content["figures"]["disk_bytes_per_s"]["source"]


def test_a_home_that_cannot_be_written(moert, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOERT_CACHE", str(tmp_path / "file" / "cache"))
    result = moert("profile")
    assert result.code == 1
    assert result.out == ""
    assert "cannot be written to" in result.err
    assert "name another file with --out, or print it with --out -." in result.err
    result = moert("profile", "--out", "-", "-t", "1")
    assert result.code == 0
    assert "measuring the disk of" in result.err
    parse_profile(json.loads(result.out))


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--out", "{folder}"], 1, "cannot be written to {folder}: it is a folder; name another file"),
        (["--disk", "{folder}/none"], 1, "cannot be written to {folder}/none: No such file or directory"),
        (["-m", "{folder}"], 2, "{folder} is no store, and none was made from it"),
        (["-m", "x", "--disk", "y"], 2, "Give either -m or --disk"),
        (["-t", "0"], 2, "threads 0 must be at least 1."),
        (["--name", " "], 2, "The device needs a --name."),
    ],
)
def test_wrong_options_are_one_sentence(moert, tmp_path, arguments, code, reason):
    result = moert("profile", *(text.format(folder=tmp_path) for text in arguments))
    assert result.code == code
    assert reason.format(folder=tmp_path) in result.err


def test_interrupted_or_failing_it_leaves_the_old_profile(moert, monkeypatch):
    own_file().parent.mkdir()
    own_file().write_text("old")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measure, "measure_overheads", interrupt)
        assert moert("profile", "-t", "1").code == 130
    assert own_file().read_text() == "old"

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(measure, "atomic_file", full)
        result = moert("profile", "-t", "1")
    assert result.code == 1
    assert f"cannot be written to {own_file()}: No space left on device; name another file" in result.err
    assert '"schema_version": 2' in result.out  # what was measured is not lost
    assert own_file().read_text() == "old"
    assert [path.name for path in own_file().parent.iterdir()] == ["device.json"]


def test_what_cannot_be_is_not_written(moert, monkeypatch):
    monkeypatch.setattr(measure, "memory_bandwidths", lambda threads: [1e20])
    result = moert("profile", "-t", "1")
    assert result.code == 1
    assert "What was measured cannot be (memory_bytes_per_s.value 1e+20 is more than any device has" in result.err
    assert not own_file().exists()
