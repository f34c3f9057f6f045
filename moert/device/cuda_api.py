"""The part of torch's CUDA that is used, whether it can be used here, and its errors as ours.

Nothing asks NVML: Jetson boards do not have it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moert.config import format_bytes
from moert.errors import DeviceError, DeviceMemoryError

LEAST_CAPABILITY = (7, 0)  # that Triton compiles for
LEAST_TRITON = (3, 4)
INSTALL_TRITON = "pip install 'moert[cuda]'"


@dataclass(frozen=True)
class Cuda:
    """Tests give their own, so that all that uses it runs without a GPU.

    module: torch.cuda. build: the CUDA that torch is built for, None without. empty: uint8 [nbytes] in device memory.
    pinned: uint8 [nbytes] of page-locked host memory. view: a tensor over an object with `__cuda_array_interface__`.
    address: where the device finds registered host memory. end_pool: ends what a capture that failed left begun, by the
    memory of its graph; RuntimeError where there is nothing. probe: launches a kernel and a product. triton: its
    version, None without. compiler: why Triton's launchers cannot be compiled, "" where they can.
    """

    module: Any
    build: str | None
    device: torch.device
    empty: Callable[[int], Tensor]
    pinned: Callable[[int], Tensor]
    view: Callable[[object], Tensor]
    address: Callable[[int], int]
    end_pool: Callable[[Any], object]
    probe: Callable[[], object]
    triton: Callable[[], str | None]
    compiler: Callable[[], str]


def of_torch(index: int = 0) -> Cuda:
    """The CUDA of torch; touches no device as yet."""
    device = torch.device("cuda", index)
    return Cuda(
        torch.cuda,
        torch.version.cuda,
        device,
        lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device),
        lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True),
        # torch takes the device from the address (tensor_numpy.cpp: at::from_blob; ATen/cuda/CUDADevice.h: by
        # cudaPointerGetAttributes) and refuses host memory only where it is not registered, so that registered memory
        # becomes a CUDA tensor without a copy. The tensor keeps the object alive. Without a device it would be copied
        # to the host (tensor_new.cpp: internal_new_from_data).
        lambda holder: torch.as_tensor(holder, device=device),
        _device_address,
        lambda pool: torch._C._cuda_endAllocateToPool(index, pool),
        lambda: _probe(device),
        _triton_version,
        lambda: _missing_compiler() or _broken_launcher(),
    )


def why_not(cuda: Cuda) -> str:
    """Why experts cannot be computed on this device, and what to do: the middle of a sentence. "" where they can."""
    if torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm: install a torch that is built for CUDA"
    if cuda.build is None:
        return f"torch {torch.__version__} is built without CUDA: install a torch that is built for CUDA"
    index = cuda.device.index or 0
    try:
        cuda.module.init()
        count = cuda.module.device_count()
        if index >= count:
            return f"there is no GPU {index}, only {count} of them, counted from 0: name another"
        properties = cuda.module.get_device_properties(index)
        have = (properties.major, properties.minor)
        if have < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            return (
                f"{properties.name} has compute capability {have[0]}.{have[1]}, and Triton needs {least}: take another"
            )
        cuda.probe()
    except (RuntimeError, AssertionError) as error:
        return _why_not_opened(str(error), cuda)
    version = cuda.triton()
    if version is None:
        return f"Triton is missing, or cannot be loaded: {INSTALL_TRITON}"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"Triton {version} is too old, {least} is needed: {INSTALL_TRITON}"
    return cuda.compiler()


def _why_not_opened(error: str, cuda: Cuda) -> str:
    """Explain why torch cannot open a device, from its error (c10/cuda/CUDAFunctions.cpp)."""
    line = error.strip().partition("\n")[0].rstrip(".")
    if "driver on your system is too old" in error:
        found = re.search(r"found version (\d+)", error)
        has = f" and this one is for CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""
        return (
            f"the NVIDIA driver is too old: torch {torch.__version__} needs one for CUDA {cuda.build}{has}; install a "
            "newer driver, or a torch that is built for an older CUDA"
        )
    if "no NVIDIA driver" in error:
        return "there is no NVIDIA driver: install one"
    if "No CUDA GPUs" in error:
        return "CUDA sees no GPU: attach one, or see what CUDA_VISIBLE_DEVICES hides"
    if "no kernel image" in error:
        built = ", ".join(cuda.module.get_arch_list()) or "none"
        return (
            f"torch {torch.__version__} has no kernels for this GPU (it has them for {built}): install a torch that is "
            "built for it; for a Jetson NVIDIA has some"
        )
    if _out_of_memory(error):
        return "all memory of the GPU is in use: end what uses it"
    return f"CUDA cannot be started ({line}): see whether other programs can use the GPU"


@contextmanager
def translated(name: str, left: Callable[[], int] | None = None) -> Iterator[None]:
    """Errors of torch and Triton about a device become DeviceError; all others stay as they are.

    name: of the device. left: bytes of its memory that can still be had.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _memory_error(name, str(error), left) from None
    except (RuntimeError, OSError) as error:
        text = str(error)
        line = text.strip().partition("\n")[0].rstrip(".")
        if "C compiler" in text:
            raise DeviceError(f"Triton finds no C compiler: install gcc, or use --device cpu ({line}).") from None
        if not _is_cuda(error, text):
            raise
        if _out_of_memory(text):
            raise _memory_error(name, text, left) from None
        raise DeviceError(f"{name} was lost ({line}): start again, or use --device cpu.") from None
    except Exception as error:
        # PTXASError: of a compiler that is older than the device, or newer than its driver.
        kind = type(error)
        if kind.__name__ not in ("OutOfResources", "PTXASError") or not kind.__module__.startswith("triton"):
            raise
        line = str(error).strip().partition("\n")[0].rstrip(".")
        raise DeviceError(f"moert's kernels do not fit {name} ({line}): use --device cpu.") from None


def _is_cuda(error: Exception, text: str) -> bool:
    words = ("CUDA error", "CUDA driver error", "[CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "CUDACachingAllocator")
    kind = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    return (kind is not None and isinstance(error, kind)) or any(word in text for word in words)


def _out_of_memory(text: str) -> bool:
    # The last: on a Jetson torch asked NVML who uses the memory, and said only that it failed (pytorch issue 185240).
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "NVML_SUCCESS == r")
    return any(word in text for word in words)


def _memory_error(name: str, text: str, left: Callable[[], int] | None) -> DeviceMemoryError:
    found = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    wanted = f"{found[1]} wanted" if found else "more wanted than there is"
    try:
        have = "" if left is None else f", {format_bytes(left())} left"
    except RuntimeError:  # it cannot even be asked
        have = ""
    return out_of_memory(name, wanted + have)


def out_of_memory(name: str, what: str) -> DeviceMemoryError:
    """The error where there is not enough. what: was wanted, and is left."""
    return DeviceMemoryError(f"Out of memory on {name}: {what}; give a smaller --device-budget.")


def _probe(device: torch.device) -> None:
    """A kernel and a product, so that what cuBLAS keeps, here and there, is seen before memory is divided."""
    x = torch.ones(16, 16, dtype=torch.float16, device=device)
    (x @ x).sum().item()


def _device_address(host: int) -> int:
    """Ask the driver for the device's address of host memory: torch has no cudaHostGetDevicePointer.

    On most devices it is the host's own address, but not on all (cudaDevAttrCanUseHostPointerForRegisteredMem). Raises
    RuntimeError as torch does.
    """
    address = ctypes.c_uint64()
    call = ctypes.CDLL("libcuda.so.1").cuMemHostGetDevicePointer_v2
    code = call(ctypes.byref(address), ctypes.c_void_p(host), ctypes.c_uint(0))
    if code:
        raise RuntimeError(f"CUDA driver error: cuMemHostGetDevicePointer returned {code}")
    return address.value


def _triton_version() -> str | None:
    try:
        import triton
    except (ImportError, OSError):
        return None
    return str(triton.__version__)


def _missing_compiler() -> str:
    """Triton compiles a launcher in C for every kernel (triton/runtime/build.py)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc"
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        return f"Triton needs Python's headers, and {include} has none: install python3-dev"
    return ""


def _broken_launcher() -> str:
    """Check whether Triton can build what launches kernels, which it does with the first of them: a second once, then
    cached.

    It asks ldconfig for libcuda.so.1 and the compiler for the rest, and lets their errors through.
    """
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of any kind: a process that failed, a file that is missing, an assertion
        line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        return f"Triton cannot build its launcher ({line}): see that gcc works, and that ldconfig -p has libcuda.so.1"
    return ""
