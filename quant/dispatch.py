"""The compiled kernel that is in use.

When a kernel is first needed, the widest instruction set that the processor has is taken, or the one that the
environment variable MOERT_KERNEL names (amx, avx512, avx2, neon, generic, reference). `reference` is torch alone; it is
also the fallback where the compiled module is missing.
"""

from __future__ import annotations

import os
from enum import StrEnum
from types import ModuleType

import torch

_native: ModuleType | None
try:
    from moert.quant import _native  # type: ignore[attr-defined, no-redef]
except ImportError:  # not built: everything still works, slowly, and `moert doctor` says so
    _native = None


class Kernel(StrEnum):
    """Instruction sets, and the torch reference."""

    AMX = "amx"
    AVX512 = "avx512"
    AVX2 = "avx2"
    NEON = "neon"
    GENERIC = "generic"
    REFERENCE = "reference"


def available_kernels() -> list[Kernel]:
    """Kernels that run on this machine, the default first."""
    names = _native.kernel_names() if _native is not None else []
    return [Kernel(name) for name in names] + [Kernel.REFERENCE]


def set_kernel(kernel: Kernel | str) -> None:
    """Use `kernel` from now on. Raises ValueError naming the kernels that this machine has."""
    global _active
    if kernel not in available_kernels():
        raise ValueError(_unavailable(kernel))
    if _native is not None and kernel != Kernel.REFERENCE:
        _native.set_kernel(str(kernel))
    _active = Kernel(kernel)


def _unavailable(kernel: str) -> str:
    return f"kernel {str(kernel)!r} is not available here (available: {', '.join(available_kernels())})"


_active: Kernel | None = None


def choose_kernel() -> Kernel:
    """Return the kernel in use; where none is yet, take the one that MOERT_KERNEL names, or else the widest.

    Raises ValueError where MOERT_KERNEL names none that this machine has, whatever is in use.
    """
    available, name = available_kernels(), os.environ.get("MOERT_KERNEL")
    if name and name not in available:
        raise ValueError(f"MOERT_KERNEL: {_unavailable(name)}")
    if _active is None:
        set_kernel(name or available[0])
    return _in_use()


def _in_use() -> Kernel:
    return choose_kernel() if _active is None else _active


def kernel_name() -> str:
    """Name of the kernel in use."""
    return str(_in_use())


def kernel_seconds() -> float:
    """Time spent in the compiled kernels so far, all callers together."""
    return 0.0 if _native is None else _native.kernel_seconds()


def compiled() -> ModuleType | None:
    """The compiled module; None where the reference is in use."""
    return None if _in_use() is Kernel.REFERENCE else _native


def loaded() -> ModuleType:
    """The compiled module, whatever is in use. Raises RuntimeError where it was not built."""
    if _native is None:
        raise RuntimeError("the compiled module moert.quant._native was not built")
    return _native


def set_num_threads(threads: int) -> None:
    """Threads of the kernels and of torch. Raises ValueError below 1."""
    if threads < 1:
        raise ValueError(f"{threads} threads: at least 1 is needed")
    torch.set_num_threads(threads)
    if _native is not None:
        _native.set_num_threads(threads)
