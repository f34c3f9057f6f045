"""Weights in device memory: in 16 bits, or as bitsandbytes computes with them, in INT8 (LLM.int8(), arXiv 2208.07339,
section 3) or NF4 (QLoRA, arXiv 2305.14314, section 3). bitsandbytes is loaded where it is needed first.

Inputs come in float32 and are rounded as the kind of weights asks for; results are float32.
"""

# T tokens, N rows (outputs), K columns (inputs)

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moert.errors import UsageError
from moert.quant.matmul import linear

DenseQuant = Literal["16", "int8", "nf4"]
Allocate = Callable[[torch.dtype, tuple[int, ...]], Tensor]

NF4_BLOCK = 64  # weights that share a scale: what QLoRA uses
ROW_STEP = 64  # rows begin a block at multiples of this, whatever K is
_OUTLIER = 6.0  # inputs from here on are multiplied in 16 bits: the threshold of LLM.int8()
BLOCK_WEIGHTS = 1 << 22  # weights that are dequantised at a time
_HALF_MAX = 65504.0


@cache
def bitsandbytes() -> Any:
    """The library. UsageError where it is not installed or cannot be loaded."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # on a CPU it says which kernels it could download
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(
            f"--dense-quant int8 and nf4 need bitsandbytes, which cannot be loaded ({reason}): install moert[cuda], or "
            "use --dense-quant 16."
        ) from None
    finally:
        logger.setLevel(before)
    return library


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [T, K], rounded to the dtype of w [N, K], times w.T: float32 [T, N], summed in float32."""
    x = x.to(w.dtype)
    if not x.is_cuda:
        return linear(x.float(), w)
    if w.dtype != torch.float32 and _mixed("mm"):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return functional.linear(x, w).float()


def products(a: Tensor, b: Tensor) -> Tensor:
    """The same for batches: a [B, M, K], b [B, K, N] of any dtype: float32 [B, M, N]."""
    if a.is_cuda and b.dtype == torch.float16 and _mixed("bmm"):
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.bmm(a, b.float())


@cache
def _mixed(name: str) -> bool:
    """Whether this torch can give a product of 16-bit numbers in float32."""
    return "dtype" in getattr(torch.ops.aten, name).overloads()


class DeviceMatrix(nn.Module, ABC):
    """A matrix [N, K] in memory that `allocate` gives, which `fill` writes: x float32 [T, K] -> float32 [T, N].

    dtype: in what is computed where that is not integers.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, allocate: Allocate) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        for name, (kind, size) in self.parts().items():
            self.register_buffer(name, allocate(kind, size))

    @abstractmethod
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What it keeps, by name."""

    @abstractmethod
    def fill(self, first: int, weights: Tensor) -> None:
        """Write rows first.. (a multiple of ROW_STEP), float32 [n, K] on the matrix's device."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class RowMatrix(DeviceMatrix):
    """A matrix whose rows can be had one by one, as an embedding needs it."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids`, int64 [T] on the matrix's device: float32 [T, K]."""


class Matrix16(RowMatrix):
    """weights: [N, K] in `dtype`."""

    weights: Tensor

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weights": (self.dtype, self.shape)}

    def fill(self, first: int, weights: Tensor) -> None:
        self.weights[first : first + len(weights)] = weights

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weights)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weights[ids].float()


class MatrixInt8(RowMatrix):
    """codes: int8 [N, K]. peaks: float32 [N], the largest magnitude of each row, which the code 127 stands for."""

    codes: Tensor
    peaks: Tensor

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"codes": (torch.int8, self.shape), "peaks": (torch.float32, self.shape[:1])}

    def fill(self, first: int, weights: Tensor) -> None:
        codes, peaks, _ = bitsandbytes().functional.int8_vectorwise_quant(weights.to(torch.float16))
        self.codes[first : first + len(weights)], self.peaks[first : first + len(weights)] = codes, peaks

    def forward(self, x: Tensor) -> Tensor:
        """Columns with an input from _OUTLIER on apart, in float32; the others with inputs in int8 for each token."""
        lib = bitsandbytes().functional
        x = x.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
        codes, peaks, outliers = lib.int8_vectorwise_quant(x, threshold=_OUTLIER)
        y: Tensor = lib.int8_linear_matmul(codes, self.codes).float()
        y *= (peaks / 127)[:, None] * (self.peaks / 127)
        if outliers is not None and len(outliers):
            columns = self.codes[:, outliers].float() * (self.peaks / 127)[:, None]
            y.addmm_(x[:, outliers].float(), columns.T)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        return self.codes[ids].float() * (self.peaks[ids] / 127)[:, None]


class MatrixNF4(DeviceMatrix):
    """codes: uint8 [N * K / 2], two weights each. peaks: float32 [N * K / 64], the largest magnitude of each block."""

    codes: Tensor
    peaks: Tensor

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        count = math.prod(self.shape)
        return {
            "codes": (torch.uint8, (-(-count // 2),)),
            "peaks": (torch.float32, (-(-count // NF4_BLOCK),)),
        }

    def fill(self, first: int, weights: Tensor) -> None:
        lib = bitsandbytes().functional
        codes, state = lib.quantize_4bit(weights, blocksize=NF4_BLOCK, quant_type="nf4")
        at = first * self.shape[1]
        self.codes[at // 2 :][: codes.numel()] = codes.view(-1)
        self.peaks[at // NF4_BLOCK :][: state.absmax.numel()] = state.absmax

    def _part(self, first: int, last: int) -> tuple[Tensor, Any]:
        """Rows first..last as bitsandbytes takes them; `first` is a multiple of ROW_STEP."""
        lib, K = bitsandbytes().functional, self.shape[1]
        codes = self.codes[first * K // 2 : -(-last * K // 2)].view(-1, 1)
        peaks = self.peaks[first * K // NF4_BLOCK : -(-last * K // NF4_BLOCK)]
        code = lib.get_4bit_type("nf4", device=codes.device)
        size = torch.Size((last - first, K))
        return codes, lib.QuantState(
            absmax=peaks, shape=size, code=code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype
        )

    def floats(self, first: int, last: int) -> Tensor:
        """Rows first..last (first a multiple of ROW_STEP) dequantised, in `dtype`."""
        codes, state = self._part(first, last)
        weights: Tensor = bitsandbytes().functional.dequantize_4bit(codes, state)
        return weights.view(last - first, -1)

    def forward(self, x: Tensor) -> Tensor:
        N, K = self.shape
        if x.is_cuda and len(x) == 1 and K % NF4_BLOCK == 0:  # a kernel of its own, which writes no weights
            codes, state = self._part(0, N)
            y: Tensor = bitsandbytes().matmul_4bit(x.to(self.dtype), codes.t(), quant_state=state)
            return y.float()
        step = max(BLOCK_WEIGHTS // K // ROW_STEP, 1) * ROW_STEP
        parts = [product(x, self.floats(first, min(first + step, N))) for first in range(0, N, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


KINDS: dict[DenseQuant, type[DeviceMatrix]] = {"16": Matrix16, "int8": MatrixInt8, "nf4": MatrixNF4}


def dtype_of(device: torch.device) -> torch.dtype:
    """In what 16-bit numbers this device computes: bfloat16 where it has it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
