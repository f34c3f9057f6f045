"""The compiled module of these steps, which is in use wherever that of the products is."""

from __future__ import annotations

from types import ModuleType

from moert.quant import dispatch

_native: ModuleType | None
try:
    from moert.kernels import _native  # type: ignore[attr-defined, no-redef]
except ImportError:  # not built: torch does the same, slowly, and `moert doctor` says so
    _native = None


def compiled() -> ModuleType | None:
    """The compiled module; None where the reference is in use."""
    return None if dispatch.compiled() is None else _native


def loaded() -> ModuleType:
    """The compiled module, whatever is in use. Raises RuntimeError where it was not built."""
    if _native is None:
        raise RuntimeError("the compiled module moert.kernels._native was not built")
    return _native
