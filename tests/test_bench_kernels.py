"""`moert bench --kernels` and the measured memory bandwidth. No test asserts a speed."""

import csv
import io
import json

import pytest
import torch

from moert.errors import MoertError
from moert.measure import bench_kernels
from moert.quant import dispatch
from moert.quant.format import ExpertLayout

from .program import Program

BANDWIDTH = 1e10


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "memory_bandwidth", lambda threads: BANDWIDTH)
    monkeypatch.setattr(bench_kernels, "HIDDEN", 64)
    monkeypatch.setattr(bench_kernels, "INNER", 32)
    monkeypatch.setattr(bench_kernels, "SAMPLE_SECONDS", 0.0)
    return Program(capsys, monkeypatch, tmp_path)


def test_the_bandwidth_is_measured_in_another_process(monkeypatch):
    before = torch.get_num_threads()
    assert bench_kernels.memory_bandwidth(1, 1 << 22) > 0
    assert torch.get_num_threads() == before
    monkeypatch.setattr(bench_kernels.sys, "executable", "/bin/false")
    with pytest.raises(MoertError, match="memory bandwidth could not be measured"):
        bench_kernels.memory_bandwidth(1)


def test_bytes_of_an_expert_are_its_codes_and_the_scales_of_its_width():
    nested, alone = ExpertLayout(128, 64, 64, (2, 3, 4)), ExpertLayout(128, 64, 64, (4,))
    weights = 3 * 128 * 64
    assert bench_kernels.expert_bytes(nested, 3) == bench_kernels.expert_bytes(alone, 1)
    assert bench_kernels.expert_bytes(nested, 2) == weights * 3 // 8 + weights // 64 * 2
    assert bench_kernels.expert_bytes(ExpertLayout(128, 64, 64, (16,), "float32"), 1) == weights * 4


def test_every_kernel_and_width_has_a_row(moert):
    active = dispatch.kernel_name()
    result = moert("bench", "--kernels", "--size", "1MiB", "-r", "3", "-o", "json", "-t", "1")
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    names = [str(k) for k in bench_kernels.kernels()]
    layouts = [(str(b), "linear", b) for b in range(2, 9)]
    layouts += [("2,3,4", code, b) for code in ("linear", "trellis") for b in (2, 3, 4)]
    want = {(kernel, *layout, tokens) for kernel in names for layout in layouts for tokens in (1, 128)}
    assert {(r["kernel"], r["widths"], r["code"], r["width"], r["n_tokens"]) for r in rows} == want
    assert len(rows) == len(want)
    weights = 3 * 64 * 32
    for row in rows:
        seconds = sorted(row["samples_s"])[1]
        assert row["repetitions"] == 3
        assert row["weights_per_s"] == pytest.approx(weights * row["n_tokens"] / seconds)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_s"] / BANDWIDTH)
        layout = ExpertLayout(64, 32, 64, (row["width"],), code=row["code"])
        assert row["bytes_per_s"] == pytest.approx(bench_kernels.expert_bytes(layout, 1) / seconds)
    assert dispatch.kernel_name() == active


@pytest.mark.parametrize("form", ["csv", "md"])
def test_kernels_are_shown_in_every_form(moert, form):
    result = moert("bench", "--kernels", "--size", "1MiB", "-r", "1", "-o", form, "--no-warmup", "-q")
    count = 26 * len(bench_kernels.kernels())
    if form == "csv":
        assert len(list(csv.DictReader(io.StringIO(result.out)))) == count
    else:
        lines = result.out.splitlines()
        assert lines[0] == "| kernel | bits | stored | code | tokens | G weights/s | GB/s | of bandwidth |"
        assert len([line for line in lines if line.startswith("|")]) == count + 2


def test_interrupted_kernels_show_what_had_ended(moert, monkeypatch):
    sample, calls = bench_kernels.sample, iter(range(1000))

    def interrupted(*args):
        if next(calls) == len(bench_kernels.kernels()) + 1:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(bench_kernels, "sample", interrupted)
    active = dispatch.kernel_name()
    result = moert("bench", "--kernels", "--size", "1MiB", "-o", "json")
    assert (result.code, len(json.loads(result.out)), dispatch.kernel_name()) == (130, 1, active)


def test_the_random_experts_are_taken_in_turn_and_give_finite_results():
    layout = ExpertLayout(64, 32, 32, (2, 4))
    buffer = bench_kernels.random_buffer(10 * sum(layout.slice_sizes) + 5)
    assert buffer.data_ptr() % 4096 == 0
    pool = bench_kernels.ExpertPool(buffer, layout, 2)
    assert len(pool.experts) == 10
    taken = pool.take(4) + pool.take(4) + pool.take(4)
    assert taken[:10] == pool.experts
    assert taken[10:] == pool.experts[:2]
    out = torch.full((2, 64), float("nan"))
    bench_kernels.sample(pool, torch.ones(1, 64), out)
    assert out.isfinite().all()


def test_a_kernel_that_this_machine_lacks_is_refused(moert, monkeypatch):
    monkeypatch.setenv("MOERT_KERNEL", "sve")
    result = moert("bench", "--kernels", "--size", "1MiB")
    assert (result.code, result.out) == (2, "")
    names = ", ".join(dispatch.available_kernels())
    assert result.err == f"moert: MOERT_KERNEL: kernel 'sve' is not available here (available: {names}).\n"
