"""Errors of the CUDA device, on a fake torch.cuda."""

import sys
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch

from moert.device import cuda_api
from moert.device.backend import ExpertBatches
from moert.device.cuda import CudaDevice, describe_cuda, open_cuda
from moert.errors import DeviceError, DeviceMemoryError
from moert.hardware.allocator import allocate
from moert.quant.format import ExpertLayout

from .fake_cuda import FakeCuda


class OutOfResources(Exception):  # noqa: N818
    __module__ = "triton.runtime.errors"


class PTXASError(Exception):
    __module__ = "triton.runtime.errors"


def accelerator_error(text):
    return getattr(torch, "AcceleratorError", RuntimeError)(text)


LOST = "Fake GPU was lost"
MEMORY = r"Out of memory on Fake GPU: "


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with"), DeviceError, LOST),
        (accelerator_error("CUDA error: an illegal memory access was encountered"), DeviceError, "illegal memory"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), DeviceError, LOST),
        (RuntimeError("cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED"), DeviceError, "start again, or use --device cpu"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total"),
            DeviceMemoryError,
            MEMORY + r"20\.50 MiB wanted, 924\.0 MiB left; give a smaller --device-budget\.$",
        ),
        (RuntimeError("CUDA error: out of memory"), DeviceMemoryError, MEMORY + "more wanted than there is"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), DeviceMemoryError, MEMORY),
        (
            RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/x/c10/cuda/CUDACachingAllocator.cpp":838'),
            DeviceMemoryError,
            MEMORY,
        ),
        (OutOfResources("out of resource: shared memory"), DeviceError, "kernels do not fit Fake GPU"),
        (
            PTXASError("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"),
            DeviceError,
            "do not fit Fake",
        ),
        (RuntimeError("Failed to find C compiler. Please specify"), DeviceError, "finds no C compiler: install gcc"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "mat1"),
        (ValueError("something else"), ValueError, "something else"),
    ],
)
def test_errors_of_torch_become_a_sentence(error, kind, message):
    device = CudaDevice(FakeCuda().api())
    with pytest.raises(kind, match=message) as found, device.guard():
        raise error
    assert type(found.value) is kind
    if isinstance(found.value, DeviceError):
        assert str(found.value).endswith(".")
        assert "\n" not in str(found.value)


def test_a_lost_device_is_a_sentence_wherever_it_shows():
    with FakeCuda() as fake:
        device = CudaDevice(fake.api())
        layout = ExpertLayout(32, 32, 32, (16,))
        memory, source = device.allocate(layout.slice_sizes[0]), allocate(layout.slice_sizes[0])
        device.page_lock(source)
        copy, experts = device.copy(source, memory), device.experts(layout, "silu", memory)
        x = torch.zeros(1, 32)
        fake.fail = RuntimeError("CUDA error: the launch timed out and was terminated")
        for use in (
            lambda: copy.done,
            lambda: copy.span,
            copy.wait,
            device.synchronise,
            device.available_bytes,
            lambda: device.send(x),
            lambda: device.fetch(x),
            lambda: device.allocate(4096),
            lambda: experts.add(ExpertBatches([[0]], [torch.tensor([0])], [torch.ones(1)]), x, x.clone()),
        ):
            with pytest.raises(DeviceError, match=r"Fake GPU was lost .*timed out"):
                use()
        device.close()
        assert not fake.locked


NO_KERNEL = RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_error": RuntimeError("Found no NVIDIA driver on your system. Please")}, "there is no NVIDIA driver"),
        ({"init_error": RuntimeError("No CUDA GPUs are available")}, "sees no GPU: attach one, or .*VISIBLE_DEVICES"),
        (
            {"init_error": RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please")},
            r"driver is too old: torch .* needs one for CUDA 12\.6 and this one is for CUDA 11\.4; install a newer",
        ),
        ({"init_error": RuntimeError("CUDA unknown error - this may be due to\nmore")}, "cannot be started .CUDA unkn"),
        ({"fail": RuntimeError("CUDA error: out of memory\nmore")}, "all memory of the GPU is in use"),
        ({"fail": NO_KERNEL}, "no kernels for this GPU .it has them for sm_80, sm_90."),
        ({"count": 0}, "there is no GPU 0, only 0 of them"),
        ({"version": None}, "Triton is missing, or cannot be loaded: pip install 'moert.cuda.'"),
        ({"version": "3.2.0+git"}, r"Triton 3\.2\.0.git is too old, 3\.4 is needed"),
        ({"missing": "Triton needs a C compiler: install gcc"}, "install gcc, or use --device cpu"),
    ],
)
def test_what_stands_in_the_way_is_said(change, message):
    fake = FakeCuda()
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(DeviceError, match=message) as error:
        open_cuda(cuda=fake.api())
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(", or use --device cpu.")
    line, reason = describe_cuda(fake.api())
    assert reason in str(error.value)
    assert bool(line) == (fake.init_error is None and fake.count > 0)


def test_the_probe_reports_what_fails(monkeypatch):
    cuda_api._probe(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", lambda *rest, **more: (_ for _ in ()).throw(NO_KERNEL))
    with pytest.raises(RuntimeError, match="no kernel image"):
        cuda_api._probe(torch.device("cpu"))


def test_an_old_gpu_is_refused():
    fake = FakeCuda()
    fake.found.major, fake.found.minor = 6, 1
    with pytest.raises(DeviceError, match=r"Fake GPU has compute capability 6\.1, and Triton needs 7\.0"):
        open_cuda(cuda=fake.api())


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match="is built without CUDA: install a torch that is built for CUDA, or use"):
        open_cuda()
    assert describe_cuda() == ("", cuda_api.why_not(cuda_api.of_torch()))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(DeviceError, match="is built for ROCm"):
        open_cuda()


@pytest.mark.parametrize(("integrated", "words"), [(False, "1.00 GiB of memory"), (True, "shares the host's memory")])
def test_a_line_about_the_gpu(integrated, words):
    line, reason = describe_cuda(FakeCuda(integrated).api())
    assert line == f"Fake GPU, {words}, compute capability 8.7, CUDA 12.6"
    assert reason == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "libcuda.so cannot found!"),
        (CalledProcessError(1, ["gcc"]), "non-zero exit status 1"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_launcher_that_triton_cannot_build_is_named(monkeypatch, error, message):
    class Broken:
        @property
        def active(self):
            raise error

    runtime = SimpleNamespace(driver=Broken())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    reason = cuda_api._broken_launcher()
    assert message in reason
    assert "\n" not in reason
    target = SimpleNamespace(get_current_target=lambda: None)
    runtime.driver = SimpleNamespace(active=target)
    assert cuda_api._broken_launcher() == ""


def test_what_triton_needs_to_compile(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cuda_api.shutil, "which", lambda name: None)
    assert cuda_api.of_torch().compiler() == "Triton needs a C compiler: install gcc"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(cuda_api.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "install python3-dev" in cuda_api.of_torch().compiler()
    (tmp_path / "Python.h").touch()
    assert cuda_api._missing_compiler() == ""


def test_the_address_for_the_device_comes_from_the_driver(monkeypatch):
    def driver(name):
        def call(address, at, flags):
            address._obj.value = (at.value or 0) + 64
            return 0 if at.value else 1

        return SimpleNamespace(cuMemHostGetDevicePointer_v2=call)

    monkeypatch.setattr(cuda_api.ctypes, "CDLL", driver)
    assert cuda_api.of_torch().address(4096) == 4160
    with pytest.raises(RuntimeError, match="returned 1"):
        cuda_api.of_torch().address(0)
