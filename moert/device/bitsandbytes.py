"""bitsandbytes, which is optional and is loaded where it is needed first."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from moert.errors import UsageError


@cache
def bitsandbytes() -> Any:
    """The library. UsageError where it is not installed or cannot be loaded."""
    before = (logger := logging.getLogger("bitsandbytes")).level
    logger.setLevel(logging.ERROR)  # on a CPU it says which kernels it could download
    try:
        import bitsandbytes as library

        # Without the part for CUDA it is loaded all the same, and each of its kernels raises.
        if torch.cuda.is_available() and not library.cextension.lib.compiled_with_cuda:
            raise ImportError(f"it has no part for this GPU's CUDA {torch.version.cuda}")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(
            f"--dense-quant int8 and nf4 need bitsandbytes, which cannot be loaded ({reason}): install moert[cuda], or "
            "use --dense-quant 16."
        ) from None
    finally:
        logger.setLevel(before)
    return library
