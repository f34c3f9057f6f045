"""A GPU that cannot be used, is too small, or is lost on the way, as a user sees it: on a fake torch.cuda."""

import pytest
import torch

from moert.device import cuda

from .fake_cuda import FakeCuda
from .program import Program
from .test_late_gpu import LateExperts, LateGpu

ASK = ("generate", "-p", "import os", "--temp", "0", "-n", "12", "-t", "1", "--precision", "routed:3")
GPU = (*ASK, "--device", "cuda", "--dense-quant", "off")


@pytest.fixture
def moert(capsys, monkeypatch, tmp_path):
    return Program(capsys, monkeypatch, tmp_path)


@pytest.fixture
def fake(monkeypatch):
    """The GPU that torch has; all that is done on it is done late."""
    with FakeCuda(total=4 << 30) as fake:
        monkeypatch.setattr(torch.version, "cuda", "12.6")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "of_torch", lambda index=0: fake.api())
        monkeypatch.setattr(cuda, "CudaDevice", lambda api: LateGpu(fake))
        yield fake


def test_a_torch_without_cuda(moert, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    result = moert(*GPU)
    assert (result.code, result.out) == (1, "")
    assert "is built without CUDA: install a torch that is built for CUDA, or use --device cpu." in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": None}, "Triton is missing, or cannot be loaded"),
        ({"init_error": RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")}, "too old"),
    ],
)
def test_what_cannot_be_used_is_said_and_left_aside(moert, fake, change, words):
    for name, value in change.items():
        setattr(fake, name, value)
    result = moert(*GPU)
    assert (result.code, result.out) == (1, "")
    assert "No GPU can be used, since " in result.err
    assert words in result.err
    auto = moert(*ASK, "--device", "auto")
    assert auto.code == 0
    assert "warning: the GPU is not used: No GPU can be used, since " in auto.err
    assert auto.out == moert(*ASK, "--device", "cpu").out != ""


def test_the_text_is_that_of_the_cpu(moert, fake):
    result = moert(*GPU, "--device-budget", "200MiB")
    assert result.code == 0, result.err
    assert "Fake GPU" in result.err
    assert result.out == moert(*ASK, "--device", "cpu").out != ""


def test_the_same_on_a_gpu_that_shares_the_hosts_memory(moert, fake):
    """With an arena so small that its slots are taken again and again."""
    fake.found.is_integrated = True
    result = moert(*GPU, "--expert-budget", "1MiB", "-v")
    assert result.code == 0, result.err
    assert "device and host share one memory" in result.err
    assert result.out == moert(*ASK, "--device", "cpu").out != ""


def test_a_budget_that_is_too_small(moert, fake):
    result = moert(*GPU, "--device-budget", "64MiB")
    assert (result.code, result.out) == (2, "")
    assert "device budget" in result.err
    assert "Traceback" not in result.err


def test_more_than_the_gpu_has_left(moert, fake):
    fake.used = (4 << 30) - (1 << 20)
    result = moert(*GPU, "--device-budget", "1GiB")
    assert (result.code, result.out) == (2, "")
    assert "give a smaller --device-budget" in result.err


@pytest.mark.parametrize("launches", [0, 3])
def test_a_gpu_that_is_lost(moert, fake, monkeypatch, launches):
    add, left = LateExperts.add, [launches]

    def until_lost(self, *arguments):
        if not left[0]:
            fake.fail = RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
        left[0] -= 1
        add(self, *arguments)

    monkeypatch.setattr(LateExperts, "add", until_lost)
    result = moert(*GPU, "--device-budget", "200MiB")
    assert result.code == 1
    assert "Fake GPU was lost (CUDA error: unspecified launch failure): start again, or use --device cpu." in result.err
    assert "Traceback" not in result.err
