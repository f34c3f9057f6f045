"""`moert profile`: what it writes and prints, and what it refuses."""

import json

import pytest

from moert.hardware.devices import own_file, this_machine
from moert.hub import resolve as source
from moert.hub.resolve import shipped_model
from moert.measure import gpu
from moert.measure import profile as measure
from moert.measure.figure import Measured
from moert.scheduler.profile import REQUIRED, parse_profile, read_profile

from .machine import FakeGpu, shrink, without_direct
from .program import Program


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    shrink(monkeypatch)
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
    assert f"use it with --profile {other}" in result.err
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


def homeless():
    raise RuntimeError("Could not determine home directory.")


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
    for name in ("MOERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(source.Path, "home", homeless)
    result = moert("profile")
    assert result.code == 1
    assert (
        "no folder to keep the profile in (Could not determine home directory.); name a file with --out" in result.err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--out", "{folder}"], 1, "cannot be written to {folder}: it is a folder; name another file"),
        (["--disk", "{folder}/none"], 1, "cannot be written to {folder}/none: No such file or directory"),
        (["-m", "{folder}"], 2, "{folder} is neither a store nor converted yet"),
        (["-m", "x", "--disk", "y"], 2, "Give either -m or --disk"),
        (["-t", "0"], 2, "threads 0 must be at least 1."),
        (["--name", " "], 2, "--name must not be empty."),
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
