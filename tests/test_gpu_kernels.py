"""Figures of moert's kernels on a GPU in `moert profile`: on devices that keep their own time, without one."""

import json

import pytest
import torch

from moert.device.backend import EmulatedDevice
from moert.errors import DeviceError
from moert.hardware.devices import devices
from moert.measure import gpu, gpu_kernels
from moert.measure import profile as measure
from moert.measure.figure import Measured
from moert.measure.gpu_kernels import find_kernels, measure_kernels
from moert.quant.format import ExpertLayout
from moert.scheduler.profile import parse_profile

from .machine import shrink

LAYOUT = ExpertLayout(64, 32, 32, (2, 4))
LAUNCH, PER_BYTE, PER_MAC, COPY = 5e-5, {1: 3e-9, 2: 2e-9}, 1e-9, 2e-5


class TimedDevice(EmulatedDevice):
    """Computes nothing, and takes exactly so long for it; the first time longer, as for compiling."""

    def __init__(self, clock, **options):
        super().__init__(**options)
        self.clock, self.closed, self.seen = clock, False, set()

    def experts(self, layout, activation, memory):
        self.layout, self.memory = layout, memory
        return self

    def add(self, routes, x, out):
        offsets, tokens_of, _ = routes
        for starts in offsets:
            sizes = self.layout.slice_sizes
            assert all(0 <= at <= len(self.memory) - sizes[index] for index, at in enumerate(starts))
        slices, tokens = len(offsets[0]), len(tokens_of[0])
        nbytes = len(offsets) * sum(self.layout.slice_sizes[:slices])
        macs = len(offsets) * (tokens - 1) * sum(n * k for n, k in self.layout.shapes)
        self.clock[0] += LAUNCH + nbytes * PER_BYTE[slices] + macs * PER_MAC
        if (len(offsets), tokens) not in self.seen:
            self.seen.add((len(offsets), tokens))
            self.clock[0] += 9.0

    def copy(self, source, target):
        self.clock[0] += COPY
        return super().copy(source, target)

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_kernels.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("integrated", [False, True])
def test_figures_of_the_kernels(clock, monkeypatch, integrated):
    monkeypatch.setattr(gpu_kernels, "BUFFER_BYTES", 1 << 20)
    lines = []
    found = measure_kernels(TimedDevice(clock, integrated=integrated), LAYOUT, lines.append)
    assert found.expert_s_per_byte == pytest.approx({2: PER_BYTE[1], 4: PER_BYTE[2]}, rel=1e-6, abs=0)
    assert found.launch_s.value == pytest.approx(LAUNCH)
    assert found.copy_latency_s.value == pytest.approx(COPY)
    tokens, experts = gpu_kernels.PROMPT_TOKENS, gpu_kernels.PROMPT_EXPERTS
    macs = experts * tokens * sum(n * k for n, k in LAYOUT.shapes)
    for slices, width in ((1, 2), (2, 4)):
        nbytes = experts * sum(LAYOUT.slice_sizes[:slices])
        seconds = LAUNCH + nbytes * PER_BYTE[slices] + macs * (tokens - 1) / tokens * PER_MAC
        assert found.prefill_macs_per_s[width] == pytest.approx(macs / seconds)
    assert found.expert_spread < 1e-6
    assert lines == ["GPU: experts of 2 bits", "GPU: experts of 4 bits"]


def test_a_device_that_computes(monkeypatch):
    """The CPU kernels in the place of a GPU's: everything is called as they want it."""
    shrink(monkeypatch)
    found = measure_kernels(EmulatedDevice(1 << 24), LAYOUT, lambda line: None)
    assert found.expert_s_per_byte.keys() == found.prefill_macs_per_s.keys() == {2, 4}
    assert min(*found.expert_s_per_byte.values(), found.launch_s.value, found.copy_latency_s.value) > 0


class Refusing(EmulatedDevice):
    def page_lock(self, memory):
        return None


def test_a_gpu_without_use_is_said(clock):
    def refuse():
        raise DeviceError("No GPU can be used, since Triton is missing, or use --device cpu.")

    lines = []
    assert find_kernels(LAYOUT, lambda line: None, lines.append, refuse) is None
    assert lines[0].startswith("No GPU can be used, since Triton is missing, or use --device cpu; torch's kernels")
    for device, words in (
        (Refusing(integrated=True), "cannot address the host's memory"),
        (TimedDevice(clock, capacity=1 << 14), "has no room for one expert of"),
    ):
        assert find_kernels(LAYOUT, lambda line: None, lines.append, lambda device=device: device) is None
        assert words in lines[-1]
    assert device.closed


def test_they_are_in_the_profile():
    figures = gpu.GpuFigures("Fake", 1 << 33, Measured(1e11, 0), Measured(1e10, 0), False, {16: 1e-11}, 0.0)
    own = gpu_kernels.KernelFigures({2: 3e-12, 4: 2e-12}, 0.1, {2: 1e12, 4: 2e12}, 0.2, *[Measured(1e-5, 0.3)] * 2)
    content = json.loads(devices()["laptop-rtx-4060-8gb"].read_text())
    content["figures"] |= measure._gpu_figures(figures, own)
    profile = parse_profile(content)
    assert profile.gpu_expert_s_per_byte == {2: 3e-12, 4: 2e-12}
    assert profile.gpu_prefill_macs_per_s == {2: 1e12, 4: 2e12}
    assert profile.gpu_launch_overhead_s == profile.host_to_device_latency_s == 1e-5
    assert "moert's kernels" in content["figures"]["gpu_expert_s_per_byte"]["source"]
    without = measure._gpu_figures(figures, None)
    assert without["gpu_expert_s_per_byte"]["value"] == {"16": 1e-11}
    assert "do not run on it" in without["gpu_expert_s_per_byte"]["source"]


@pytest.mark.gpu
def test_the_kernels_of_this_gpu():
    from moert.device import cuda_api

    reason = cuda_api.why_not(cuda_api.of_torch())
    if reason:
        pytest.skip(f"no GPU that can be used: {reason}")
    lines = []
    found = find_kernels(ExpertLayout(2048, 768, 64, (2, 3, 4)), lines.append, lines.append)
    assert found is not None, lines
    assert found.expert_s_per_byte.keys() == {2, 3, 4}
    assert all(1e-14 < cost < 1e-8 for cost in found.expert_s_per_byte.values())
    assert torch.cuda.is_available()
